{{- /* The containers: watcher and enforcer, or one with both under supervisord. */ -}}

{{- define "power-agent.watcher" -}}
- name: watcher
  image: {{ include "power-agent.image" . | quote }}
  imagePullPolicy: {{ include "power-agent.pullPolicy" . }}
  command: ["/opt/power-agent/watcher/bin/python", "-I", "-m", "watcher"]
  env:
    {{- include "power-agent.watcherEnv" . | nindent 4 }}
    {{- include "power-agent.extraEnv" (list . "watcher") | nindent 4 }}
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
    {{- include "power-agent.seLinux" .Values | nindent 4 }}
  {{- if include "power-agent.metricsPort" . }}
  {{- include "power-agent.probes" (dict "numbers" .Values.probes.watcher "http" true) | nindent 2 }}
  {{- end }}
  resources:
    {{- toYaml .Values.resources.watcher | nindent 4 }}
  volumeMounts:
    # Connecting to a socket needs no writable mount.
    - name: run
      mountPath: {{ include "power-agent.runDir" . }}
      readOnly: true
    {{- include "power-agent.tokenMount" . | nindent 4 }}
    {{- include "power-agent.extraMounts" (list . "watcher") | nindent 4 }}
{{- end }}

{{- define "power-agent.enforcer" -}}
- name: enforcer
  image: {{ include "power-agent.image" . | quote }}
  imagePullPolicy: {{ include "power-agent.pullPolicy" . }}
  command: ["/opt/power-agent/enforcer/bin/python", "-I", "-m", "enforcer"]
  env:
    {{- include "power-agent.enforcerEnv" . | nindent 4 }}
    {{- include "power-agent.extraEnv" (list . "enforcer") | nindent 4 }}
  securityContext:
    {{- include "power-agent.rootSecurityContext" (dict "values" .Values "capabilities" list) | nindent 4 }}
  {{- include "power-agent.probes" (dict "numbers" .Values.probes.enforcer "http" false) | nindent 2 }}
  resources:
    {{- toYaml .Values.resources.enforcer | nindent 4 }}
  volumeMounts:
    {{- include "power-agent.rootMounts" . | nindent 4 }}
    {{- include "power-agent.extraMounts" (list . "enforcer") | nindent 4 }}
{{- end }}

{{- define "power-agent.supervised" -}}
- name: power-agent
  image: {{ include "power-agent.image" . | quote }}
  imagePullPolicy: {{ include "power-agent.pullPolicy" . }}
  command: ["supervisord", "-c", "/opt/power-agent/supervisord.conf"]
  env:
    {{- include "power-agent.supervisedEnv" . | nindent 4 }}
    {{- include "power-agent.extraEnv" (list . "watcher" "enforcer") | nindent 4 }}
  {{- with include "power-agent.metricsPorts" . }}
  {{- trim . | nindent 2 }}
  {{- end }}
  securityContext:
    # supervisord starts the watcher as another user, and has to be able to end it.
    {{- include "power-agent.rootSecurityContext" (dict "values" .Values "capabilities" (list "SETUID" "SETGID" "KILL")) | nindent 4 }}
  {{- if include "power-agent.metricsPort" . }}
  {{- include "power-agent.probes" (dict "numbers" .Values.probes.supervised "http" true) | nindent 2 }}
  {{- else }}
  # Nobody serves /healthz. The watchdog inside watches both programs.
  {{- include "power-agent.probes" (dict "numbers" (pick .Values.probes.enforcer "readiness") "http" false) | nindent 2 }}
  {{- end }}
  resources:
    {{- toYaml .Values.resources.supervised | nindent 4 }}
  volumeMounts:
    {{- include "power-agent.rootMounts" . | nindent 4 }}
    {{- include "power-agent.tokenMount" . | nindent 4 }}
    {{- include "power-agent.extraMounts" (list . "watcher" "enforcer") | nindent 4 }}
{{- end }}
