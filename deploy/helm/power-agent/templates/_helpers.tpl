{{- /* Names, labels, and the parts that both forms of the pod share. */ -}}

{{- define "power-agent.name" -}}
{{- $chart := .Values.nameOverride | default .Chart.Name }}
{{- if .Values.fullnameOverride }}{{ .Values.fullnameOverride }}{{ else if contains $chart .Release.Name }}{{ .Release.Name }}{{ else }}{{ printf "%s-%s" .Release.Name $chart }}{{ end }}
{{- end }}
{{- define "power-agent.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (include "power-agent.name" .) }}
{{- end }}

{{- /* The container that is root and needs the GPUs. */ -}}
{{- define "power-agent.container" -}}
{{ .Values.supervised | ternary "power-agent" "enforcer" }}
{{- end }}

{{- define "power-agent.selector" -}}
app: power-agent
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "power-agent.labels" -}}
{{ include "power-agent.selector" . }}
app.kubernetes.io/name: power-agent
app.kubernetes.io/component: agent
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "power-agent.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag }}
{{- with .Values.image.digest }}@{{ . }}{{ end }}
{{- end }}

{{- /* docker.io's, where nobody of the product has an account: a name without a registry is docker.io's. */ -}}
{{- define "power-agent.strangers" -}}
{{- if regexMatch "^((index\\.|registry-1\\.)?docker\\.io/)?((dynamo|library)/.+|[^/]+)$" .Values.image.repository }}true{{ end }}
{{- end }}
{{- define "power-agent.pullPolicy" -}}
{{ .Values.image.pullPolicy | default (ternary "Never" "IfNotPresent" (eq (include "power-agent.strangers" .) "true")) }}
{{- end }}

{{- /* Where a setting is not given, these are the agent's own defaults (each program's settings.py). */ -}}
{{- define "power-agent.annotation" -}}
{{ .Values.settings.annotation | default "dynamo.nvidia.com/gpu-power-limit" }}
{{- end }}
{{- define "power-agent.uid" -}}
{{ int64 (.Values.settings.watcherUid | default 65532) }}
{{- end }}
{{- define "power-agent.runDir" -}}
{{ .Values.settings.runDir | default "/run/power-agent" }}
{{- end }}
{{- define "power-agent.stateDir" -}}
{{ .Values.settings.stateDir | default "/var/lib/power-agent" }}
{{- end }}
{{- define "power-agent.ownProcRoot" -}}
{{- with .Values.settings.procRoot }}{{ if ne (trimSuffix "/" .) "/proc" }}{{ . }}{{ end }}{{ end }}
{{- end }}
{{- define "power-agent.ownSysfsRoot" -}}
{{- with .Values.settings.sysfsRoot }}{{ if ne (trimSuffix "/" .) "/sys" }}{{ . }}{{ end }}{{ end }}
{{- end }}
{{- define "power-agent.kubeletDir" -}}
{{- $dir := .Values.settings.kubeletDir | default "/var/lib/kubelet" }}
{{- if ne $dir "off" }}{{ trimSuffix "/" $dir }}{{ end }}
{{- end }}
{{- define "power-agent.metricsPort" -}}
{{- $address := .Values.settings.metricsAddr | default ":9100" }}
{{- if ne $address "off" }}{{ last (splitList ":" $address) }}{{ end }}
{{- end }}

{{- /* Variables of one program: a list of [variable, value], those left null omitted. */ -}}
{{- define "power-agent.variables" -}}
{{- range . }}
{{- if not (kindIs "invalid" (last .)) }}
- name: {{ first . }}
  value: {{ last . | toString | quote }}
{{- end }}
{{- end }}
{{- end }}

{{- define "power-agent.commonVariables" -}}
{{- $s := .Values.settings }}
{{- include "power-agent.variables" (list
  (list "POWER_AGENT_RUN_DIR" $s.runDir)
  (list "POWER_AGENT_LOG_LEVEL" $s.logLevel)
  (list "POWER_AGENT_LOG_FORMAT" $s.logFormat)
) }}
{{- end }}

{{- define "power-agent.watcherVariables" -}}
{{- $s := .Values.settings }}
{{- include "power-agent.variables" (list
  (list "WATCH_NAMESPACE" $s.watchNamespace)
  (list "POWER_AGENT_ANNOTATION" $s.annotation)
  (list "POWER_AGENT_METRICS_ADDR" $s.metricsAddr)
  (list "POWER_AGENT_EVENTS" $s.events)
) }}
{{- end }}

{{- define "power-agent.enforcerVariables" -}}
{{- $s := .Values.settings }}
{{- $uid := $s.watcherUid }}
{{- if not (kindIs "invalid" $uid) }}{{ $uid = int64 $uid }}{{ end }}
{{- include "power-agent.variables" (list
  (list "POWER_AGENT_MIN_WATTS" $s.minWatts)
  (list "POWER_AGENT_MAX_WATTS" $s.maxWatts)
  (list "POWER_AGENT_SAFE_DEFAULT" $s.safeDefault)
  (list "POWER_AGENT_CONFLICT" $s.conflict)
  (list "POWER_AGENT_RELEASE_TO" $s.releaseTo)
  (list "POWER_AGENT_ON_EXIT" $s.onExit)
  (list "POWER_AGENT_EXIT_SECONDS" $s.exitSeconds)
  (list "POWER_AGENT_LEASE" $s.lease)
  (list "POWER_AGENT_DRY_RUN" $s.dryRun)
  (list "POWER_AGENT_SCAN_SECONDS" $s.scanSeconds)
  (list "POWER_AGENT_RECONCILE_SECONDS" $s.reconcileSeconds)
  (list "POWER_AGENT_WATCHER_UID" $uid)
  (list "POWER_AGENT_READER_UIDS" $s.readerUids)
  (list "POWER_AGENT_STATE_DIR" $s.stateDir)
  (list "POWER_AGENT_PROC_ROOT" $s.procRoot)
  (list "POWER_AGENT_SYSFS_ROOT" $s.sysfsRoot)
  (list "POWER_AGENT_CGROUP_ROOT" $s.cgroupRoot)
  (list "POWER_AGENT_KUBELET_DIR" (include "power-agent.kubeletDir" . | default nil))
  (list "POWER_AGENT_KUBELET_RESOURCES" $s.kubeletResources)
) }}
{{- end }}

{{- define "power-agent.nodeEnv" -}}
- name: NODE_NAME
  valueFrom:
    fieldRef:
      apiVersion: v1
      fieldPath: spec.nodeName
{{- end }}

{{- define "power-agent.gpuEnv" -}}
- name: NVIDIA_VISIBLE_DEVICES
  value: {{ if .Values.driver.cdiDevice }}"void"{{ else }}{{ .Values.driver.visibleDevices | quote }}{{ end }}
- name: NVIDIA_DRIVER_CAPABILITIES
  value: "utility"
{{- with .Values.driver.libraryPath }}
- name: LD_LIBRARY_PATH
  value: {{ . | quote }}
{{- end }}
{{- end }}

{{- define "power-agent.watcherEnv" -}}
{{ include "power-agent.nodeEnv" . }}
- name: NVIDIA_VISIBLE_DEVICES
  value: "void"
{{- include "power-agent.watcherVariables" . }}
{{- include "power-agent.commonVariables" . }}
{{- end }}

{{- define "power-agent.enforcerEnv" -}}
{{ include "power-agent.gpuEnv" . }}
{{- include "power-agent.enforcerVariables" . }}
{{- include "power-agent.commonVariables" . }}
{{- end }}

{{- define "power-agent.supervisedEnv" -}}
{{ include "power-agent.nodeEnv" . }}
{{ include "power-agent.gpuEnv" . }}
{{- with .Values.settings.runDir }}
# supervisord's own, in the image /run/power-agent: the one folder in memory that it may write.
- name: TMPDIR
  value: {{ . | quote }}
{{- end }}
{{- include "power-agent.watcherVariables" . }}
{{- include "power-agent.enforcerVariables" . }}
{{- include "power-agent.commonVariables" . }}
{{- end }}

{{- define "power-agent.metricsPorts" -}}
{{- with include "power-agent.metricsPort" . }}
ports:
  - name: metrics
    containerPort: {{ . }}
    protocol: TCP
{{- end }}
{{- end }}

{{- /* What root's container may do; the argument holds the values and further capabilities. */ -}}
{{- define "power-agent.rootSecurityContext" -}}
runAsUser: 0
runAsGroup: 0
readOnlyRootFilesystem: true
{{- if eq .values.privileges "all" }}
# Setting a power limit takes CAP_SYS_ADMIN in the host's user namespace and the device nodes;
# this is the form that works everywhere.
privileged: true
{{- else }}
privileged: false
allowPrivilegeEscalation: false
capabilities:
  drop: ["ALL"]
  add:
    {{- range concat (list "SYS_ADMIN" "SYS_PTRACE") .capabilities }}
    - {{ . }}
    {{- end }}
# The runtime's profile forbids looking at processes that it does not confine, such as pid 1.
appArmorProfile:
  type: Unconfined
{{- end }}
{{- include "power-agent.seLinux" .values }}
{{- end }}

{{- /* Under SELinux a container's own type may not connect to a privileged one's socket, and its
categories keep it from the other container's files. A privileged container needs no label, and
containerd ignores it there. */ -}}
{{- define "power-agent.seLinux" -}}
{{- with .seLinuxOptions | default (ternary .seLinux.options dict .seLinux.enabled) }}
seLinuxOptions:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* The three probes of a container: by HTTP from the watcher, or the enforcer's own. */ -}}
{{- define "power-agent.probes" -}}
{{- range $kind := list "startup" "liveness" "readiness" }}
{{- with index $.numbers $kind }}
{{ $kind }}Probe:
  {{- if $.http }}
  httpGet:
    path: {{ ternary "/readyz" "/healthz" (eq $kind "readiness") }}
    port: metrics
  {{- else }}
  exec:
    command: ["probe", "8"]
  {{- end }}
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}

{{- /* What the administrator adds to the containers named after the root of all values. */ -}}
{{- define "power-agent.extraEnv" -}}
{{- $values := (first .).Values }}
{{- $all := $values.extraEnv }}
{{- range rest . }}{{ $all = concat $all (index $values .).extraEnv }}{{ end }}
{{- with $all }}
{{- toYaml . }}
{{- end }}
{{- end }}
{{- define "power-agent.extraMounts" -}}
{{- $values := (first .).Values }}
{{- $all := $values.extraVolumeMounts }}
{{- range rest . }}{{ $all = concat $all (index $values .).extraVolumeMounts }}{{ end }}
{{- with $all }}
{{- toYaml . }}
{{- end }}
{{- end }}

{{- define "power-agent.rootMounts" -}}
- name: run
  mountPath: {{ include "power-agent.runDir" . }}
- name: state
  mountPath: {{ include "power-agent.stateDir" . }}
{{- with include "power-agent.kubeletDir" . }}
- name: kubelet
  mountPath: {{ . }}{{ if not $.Values.dra }}/device-plugins{{ end }}
  readOnly: true
  {{- if $.Values.dra }}
  # Or the volumes of pods that have ended stayed mounted in here, and in use.
  mountPropagation: HostToContainer
  {{- end }}
{{- end }}
{{- if .Values.driver.hostPath }}
- name: driver
  mountPath: {{ .Values.driver.mountPath }}
  readOnly: true
{{- end }}
{{- with include "power-agent.ownProcRoot" . }}
- name: proc
  mountPath: {{ . }}
  readOnly: true
{{- end }}
{{- with include "power-agent.ownSysfsRoot" . }}
- name: sys
  mountPath: {{ . }}
  readOnly: true
{{- end }}
{{- end }}

{{- define "power-agent.tokenMount" -}}
- name: token
  mountPath: /var/run/secrets/kubernetes.io/serviceaccount
  readOnly: true
{{- end }}
