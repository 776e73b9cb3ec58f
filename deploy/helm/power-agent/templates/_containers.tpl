{{- /* The containers: watcher and enforcer, or one with both under supervisord. */ -}}

{{- define "power-agent.watcher" -}}
- name: watcher
  image: {{ include "power-agent.image" . | quote }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command: ["/opt/power-agent/watcher/bin/python", "-I", "-m", "watcher"]
  env:
    {{- include "power-agent.watcherEnv" . | nindent 4 }}
  {{- with include "power-agent.metricsPorts" . }}
  {{- trim . | nindent 2 }}
  {{- end }}
  securityContext:
    runAsNonRoot: true
    runAsUser: {{ include "power-agent.uid" . }}
    runAsGroup: {{ include "power-agent.uid" . }}
    privileged: false
    allowPrivilegeEscalation: false
    readOnlyRootFilesystem: true
    capabilities:
      drop: ["ALL"]
    seccompProfile:
      type: RuntimeDefault
    {{- with include "power-agent.seLinux" .Values }}
    {{- . | nindent 4 }}
    {{- end }}
  {{- if include "power-agent.metricsPort" . }}
  # Two minutes: where all processors are busy its start takes many seconds.
  startupProbe:
    httpGet:
      path: /healthz
      port: metrics
    periodSeconds: 2
    timeoutSeconds: 3
    failureThreshold: 60
  livenessProbe:
    httpGet:
      path: /healthz
      port: metrics
    periodSeconds: 10
    timeoutSeconds: 3
    failureThreshold: 3
  # Ready means that it enforces. It is not ready while the enforcer or NVML does not answer.
  readinessProbe:
    httpGet:
      path: /readyz
      port: metrics
    periodSeconds: 5
    timeoutSeconds: 3
    failureThreshold: 2
  {{- end }}
  resources:
    {{- toYaml .Values.resources.watcher | nindent 4 }}
  volumeMounts:
    # Connecting to a socket needs no writable mount.
    - name: run
      mountPath: {{ include "power-agent.runDir" . }}
      readOnly: true
    {{- include "power-agent.tokenMount" . | nindent 4 }}
{{- end }}

{{- define "power-agent.enforcer" -}}
- name: enforcer
  image: {{ include "power-agent.image" . | quote }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command: ["/opt/power-agent/enforcer/bin/python", "-I", "-m", "enforcer"]
  env:
    {{- include "power-agent.enforcerEnv" . | nindent 4 }}
  securityContext:
    {{- include "power-agent.rootSecurityContext" (dict "values" .Values "capabilities" list) | nindent 4 }}
  # A shell looks whether the loop has turned in the last seconds; where it has not, powerctl
  # asks, which takes a tenth of a second of processor time on a node that may be busy.
  # An hour: where another agent still holds the node's ledger, this one waits for it.
  startupProbe:
    {{- include "power-agent.probe" . | nindent 4 }}
    periodSeconds: 5
    timeoutSeconds: 10
    failureThreshold: 720
  livenessProbe:
    {{- include "power-agent.probe" . | nindent 4 }}
    periodSeconds: 20
    timeoutSeconds: 10
    failureThreshold: 3
  readinessProbe:
    {{- include "power-agent.probe" . | nindent 4 }}
    periodSeconds: 20
    timeoutSeconds: 10
    failureThreshold: 1
  resources:
    {{- toYaml .Values.resources.enforcer | nindent 4 }}
  volumeMounts:
    {{- include "power-agent.rootMounts" . | nindent 4 }}
{{- end }}

{{- define "power-agent.supervised" -}}
- name: power-agent
  image: {{ include "power-agent.image" . | quote }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command: ["supervisord", "-c", "/opt/power-agent/supervisord.conf"]
  env:
    {{- include "power-agent.supervisedEnv" . | nindent 4 }}
  {{- with include "power-agent.metricsPorts" . }}
  {{- trim . | nindent 2 }}
  {{- end }}
  securityContext:
    # supervisord starts the watcher as another user, and has to be able to end it.
    {{- include "power-agent.rootSecurityContext" (dict "values" .Values "capabilities" (list "SETUID" "SETGID" "KILL")) | nindent 4 }}
  {{- if include "power-agent.metricsPort" . }}
  # Two minutes: where all processors are busy a start takes many seconds.
  startupProbe:
    httpGet:
      path: /healthz
      port: metrics
    periodSeconds: 2
    timeoutSeconds: 3
    failureThreshold: 60
  # The watchdog inside watches both programs. This probe is for what it cannot repair.
  livenessProbe:
    httpGet:
      path: /healthz
      port: metrics
    periodSeconds: 20
    timeoutSeconds: 3
    failureThreshold: 6
  # Ready means that it enforces.
  readinessProbe:
    httpGet:
      path: /readyz
      port: metrics
    periodSeconds: 5
    timeoutSeconds: 3
    failureThreshold: 2
  {{- else }}
  readinessProbe:
    {{- include "power-agent.probe" . | nindent 4 }}
    periodSeconds: 20
    timeoutSeconds: 10
    failureThreshold: 1
  {{- end }}
  resources:
    {{- toYaml .Values.resources.supervised | nindent 4 }}
  volumeMounts:
    {{- include "power-agent.rootMounts" . | nindent 4 }}
    {{- include "power-agent.tokenMount" . | nindent 4 }}
{{- end }}
