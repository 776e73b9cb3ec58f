{{- /* What values.schema.json cannot say: relations between values, and with the cluster. */ -}}
{{- define "power-agent.validate" -}}
{{- include "power-agent.bounds" (list "settings" .Values.settings.minWatts .Values.settings.maxWatts) }}
{{- if .Values.admission.enabled }}
{{- include "power-agent.bounds" (list "admission" (include "power-agent.admissionMin" . | default nil) (include "power-agent.admissionMax" . | default nil)) }}
{{- if semverCompare "<1.30.0-0" .Capabilities.KubeVersion.Version }}
{{- fail (printf "admission.enabled needs Kubernetes 1.30 or later, this is %s: set it to false" .Capabilities.KubeVersion.Version) }}
{{- end }}
{{- end }}
{{- if and (ne .Values.privileges "all") (semverCompare "<1.30.0-0" .Capabilities.KubeVersion.Version) }}
{{- fail (printf "privileges=minimal needs Kubernetes 1.30 or later (appArmorProfile), this is %s: set it to all" .Capabilities.KubeVersion.Version) }}
{{- end }}
{{- if eq (include "power-agent.uid" .) "0" }}
{{- fail "settings.watcherUid is 0, and the watcher must not be root: name another user, or leave it null" }}
{{- end }}
{{- if and .Values.supervised (gt (float64 (.Values.settings.exitSeconds | default 0)) 13.0) }}
{{- fail (printf "settings.exitSeconds=%v is too long with supervised=true, where supervisord kills after 15: set it to at most 13" .Values.settings.exitSeconds) }}
{{- end }}
{{- $exit := float64 (.Values.settings.exitSeconds | default 10) }}
{{- if gt (addf $exit 5.0) (float64 .Values.terminationGracePeriodSeconds) }}
{{- fail (printf "terminationGracePeriodSeconds=%v is not 5 above settings.exitSeconds=%v, so a stop would be cut off before GPUs are given back: raise it" .Values.terminationGracePeriodSeconds $exit) }}
{{- end }}
{{- if and .Values.supervised (lt (int .Values.terminationGracePeriodSeconds) 22) }}
{{- fail (printf "terminationGracePeriodSeconds=%v is too short with supervised=true, where supervisord takes up to 22 to stop watcher, enforcer and watchdog one after the other: raise it" .Values.terminationGracePeriodSeconds) }}
{{- end }}
{{- if and .Values.resourceQuota.enabled (not .Values.priorityClassName) }}
{{- fail "resourceQuota.enabled=true is for pods of priorityClassName, which is empty: name a class, or set it to false" }}
{{- end }}
{{- if and .Values.driver.libraryPath (not .Values.driver.hostPath) }}
{{- fail (printf "driver.libraryPath=%s has no folder of the node to come from: set driver.hostPath" .Values.driver.libraryPath) }}
{{- end }}
{{- if and .Values.driver.hostPath (not .Values.driver.libraryPath) }}
{{- fail (printf "driver.hostPath=%s is mounted, but the loader does not look there: set driver.libraryPath to the folder of libnvidia-ml.so.1 below driver.mountPath" .Values.driver.hostPath) }}
{{- end }}
{{- if and .Values.driver.hostPath (ne .Values.privileges "all") }}
{{- fail (printf "driver.hostPath=%s with privileges=%s: it brings the library, but only a privileged container has the device files without NVIDIA's runtime: set privileges=all" .Values.driver.hostPath .Values.privileges) }}
{{- end }}
{{- with .Values.settings.metricsAddr }}
{{- if regexMatch "^(localhost|127\\..*|\\[?::(ffff:127\\..*|1)\\]?):[0-9]+$" . }}
{{- fail (printf "settings.metricsAddr=%s: the kubelet's probes and Prometheus do not reach a pod's loopback: name 0.0.0.0 or [::] with the port, or off" .) }}
{{- end }}
{{- end }}
{{- include "power-agent.validateImage" . }}
{{- include "power-agent.validatePaths" . }}
{{- include "power-agent.validateNodes" . }}
{{- include "power-agent.validateExtras" . }}
{{- include "power-agent.validateSwitches" . }}
{{- include "power-agent.validateMonitoring" . }}
{{- include "power-agent.validateWatts" . }}
{{- end }}

{{- define "power-agent.bounds" -}}
{{- $where := index . 0 }}{{ $min := index . 1 }}{{ $max := index . 2 }}
{{- if and $min $max (gt (float64 $min) (float64 $max)) }}
{{- fail (printf "%s.minWatts=%v is above %s.maxWatts=%v: lower the first or raise the second" $where $min $where $max) }}
{{- end }}
{{- end }}

{{- /* The policies' bounds are the agent's where they have none of their own. */ -}}
{{- define "power-agent.admissionMin" -}}
{{- with .Values.admission.minWatts | default .Values.settings.minWatts }}{{ . }}{{ end }}
{{- end }}
{{- define "power-agent.admissionMax" -}}
{{- with .Values.admission.maxWatts | default .Values.settings.maxWatts }}{{ . }}{{ end }}
{{- end }}

{{- /* Nobody of the product has an account at docker.io, so an image from there is a stranger's. */ -}}
{{- define "power-agent.validateImage" -}}
{{- $i := .Values.image }}
{{- if and (include "power-agent.strangers" .) (not $i.digest) (has $i.pullPolicy (list "Always" "IfNotPresent")) }}
{{- fail (printf "image.pullPolicy=%s would pull image.repository=%s from docker.io, from an account that is not the product's: name the registry that you pushed to, pin image.digest, or leave the policy empty, so that nodes take only what is on them" $i.pullPolicy $i.repository) }}
{{- end }}
{{- end }}

{{- /* What is asked for by itself has to fit the bounds, and so have the policies' bounds. */ -}}
{{- define "power-agent.validateWatts" -}}
{{- $s := .Values.settings }}
{{- $default := $s.safeDefault | toString }}
{{- if and $s.safeDefault (not (hasSuffix "%" $default)) }}
{{- if and $s.minWatts (lt (float64 $default) (float64 $s.minWatts)) }}
{{- fail (printf "settings.safeDefault=%s is below settings.minWatts=%v, so it would never be set: raise the first or lower the second" $default $s.minWatts) }}
{{- end }}
{{- if and $s.maxWatts (gt (float64 $default) (float64 $s.maxWatts)) }}
{{- fail (printf "settings.safeDefault=%s is above settings.maxWatts=%v, so it would never be set: lower the first or raise the second" $default $s.maxWatts) }}
{{- end }}
{{- end }}
{{- if .Values.admission.enabled }}
{{- $min := include "power-agent.admissionMin" . }}{{ $max := include "power-agent.admissionMax" . }}
{{- if and $min $s.maxWatts (gt (float64 $min) (float64 $s.maxWatts)) }}
{{- fail (printf "admission.minWatts=%s is above settings.maxWatts=%v: every limit that may be written would be clamped; lower the first or raise the second" $min $s.maxWatts) }}
{{- end }}
{{- if and $max $s.minWatts (lt (float64 $max) (float64 $s.minWatts)) }}
{{- fail (printf "admission.maxWatts=%s is below settings.minWatts=%v: every limit that may be written would be clamped; raise the first or lower the second" $max $s.minWatts) }}
{{- end }}
{{- end }}
{{- end }}

{{- /* A folder of the agent's own is neither the root nor one that the node or the image lives from. */ -}}
{{- define "power-agent.validatePaths" -}}
{{- $s := .Values.settings }}
{{- $kubelet := $s.kubeletDir | default "/var/lib/kubelet" }}
{{- if eq $kubelet "off" }}
{{- if .Values.dra }}
{{- fail "dra=true reads a file in the kubelet's root, but settings.kubeletDir=off names none: set one of them otherwise" }}
{{- end }}
{{- $kubelet = "" }}
{{- end }}
{{- $folders := dict "settings.stateDir" $s.stateDir "settings.runDir" $s.runDir "settings.procRoot" (include "power-agent.ownProcRoot" .) "settings.sysfsRoot" (include "power-agent.ownSysfsRoot" .) "settings.kubeletDir" $kubelet }}
{{- with .Values.driver }}
{{- if .hostPath }}{{ $folders = merge $folders (dict "driver.mountPath" .mountPath "driver.hostPath" .hostPath) }}{{ end }}
{{- end }}
{{- range $name, $path := $folders }}
{{- with $path }}
{{- if eq (clean .) "/" }}
{{- fail (printf "%s=%s is the whole root: name a folder of its own" $name .) }}
{{- end }}
{{- if ne (trimSuffix "/" .) (clean .) }}
{{- fail (printf "%s=%s: write it without //, /. and /.., as %s" $name . (clean .)) }}
{{- end }}
{{- if and (ne $name "driver.hostPath") (include "power-agent.systemFolder" .) }}
{{- fail (printf "%s=%s is the system's own: name a folder of its own, such as %s" $name . (get (dict "settings.stateDir" "/var/lib/power-agent" "settings.runDir" "/run/power-agent" "settings.procRoot" "/host/proc" "settings.sysfsRoot" "/host/sys" "settings.kubeletDir" "/var/lib/kubelet" "driver.mountPath" "/usr/local/nvidia") $name)) }}
{{- end }}
{{- end }}
{{- end }}
{{- /* The enforcer makes its folder root's alone. */ -}}
{{- with regexFind "^/var/lib/(containerd|containers|crio|docker|etcd|kubelet)(/|$)" ($s.stateDir | default "") }}
{{- fail (printf "settings.stateDir=%s belongs to another program of the node: name a folder of its own, such as /var/lib/power-agent" $s.stateDir) }}
{{- end }}
{{- $d := .Values.driver }}
{{- if and $d.hostPath $d.libraryPath (not (hasPrefix (printf "%s/" (trimSuffix "/" $d.mountPath)) (printf "%s/" $d.libraryPath))) }}
{{- fail (printf "driver.libraryPath=%s is not below driver.mountPath=%s, where driver.hostPath is mounted: name a folder there" $d.libraryPath $d.mountPath) }}
{{- end }}
{{- include "power-agent.validateOverlap" . }}
{{- end }}

{{- define "power-agent.systemFolder" -}}
{{- if regexMatch "^/(bin|boot|dev|etc|home|lib|lib32|lib64|media|mnt|opt|proc|root|run|sbin|srv|sys|tmp|usr|var|(usr|usr/local)/(bin|include|lib|lib64|libexec|local|sbin|share)|var/(cache|lib|log|run|spool|tmp)|run/(lock|secrets|user))/?$" . }}true{{ end }}
{{- if regexMatch "^/(bin|boot|dev|etc|lib|lib32|lib64|opt/power-agent|proc|sbin|sys|tmp|usr/(bin|lib|lib64|sbin)|var/tmp)/" (printf "%s/" .) }}true{{ end }}
{{- end }}

{{- /* Where the chart mounts something, by the value that says so. */ -}}
{{- define "power-agent.ownMounts" -}}
settings.runDir: {{ include "power-agent.runDir" . | trimSuffix "/" | quote }}
settings.stateDir: {{ include "power-agent.stateDir" . | trimSuffix "/" | quote }}
the service account's token: /var/run/secrets/kubernetes.io/serviceaccount
{{- with include "power-agent.kubeletDir" . }}
settings.kubeletDir: {{ . | quote }}
{{- end }}
{{- with include "power-agent.ownProcRoot" . }}
settings.procRoot: {{ . | trimSuffix "/" | quote }}
{{- end }}
{{- with include "power-agent.ownSysfsRoot" . }}
settings.sysfsRoot: {{ . | trimSuffix "/" | quote }}
{{- end }}
{{- if .Values.driver.hostPath }}
driver.mountPath: {{ .Values.driver.mountPath | trimSuffix "/" | quote }}
{{- end }}
{{- end }}

{{- /* One folder inside another hides files, or shows them to the wrong container. */ -}}
{{- define "power-agent.validateOverlap" -}}
{{- $mounts := fromYaml (include "power-agent.ownMounts" .) }}
{{- $all := deepCopy $mounts }}
{{- range $from, $list := dict "extraVolumeMounts" .Values.extraVolumeMounts "watcher.extraVolumeMounts" .Values.watcher.extraVolumeMounts "enforcer.extraVolumeMounts" .Values.enforcer.extraVolumeMounts }}
{{- range $list }}{{ $_ := set $all (printf "%s %s" $from .name) (trimSuffix "/" .mountPath) }}{{ end }}
{{- end }}
{{- range $name, $path := $all }}
{{- range $other, $outer := $mounts }}
{{- if and (ne $name $other) (or (hasPrefix (printf "%s/" $outer) (printf "%s/" $path)) (hasPrefix (printf "%s/" $path) (printf "%s/" $outer))) }}
{{- fail (printf "%s (%s) and %s (%s) lie one inside the other: name different folders" $name $path $other $outer) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- /* Privileged pods where there is no GPU are wanted by nobody who does not say so. */ -}}
{{- define "power-agent.validateNodes" -}}
{{- $required := list }}
{{- with .Values.affinity.nodeAffinity }}
{{- with .requiredDuringSchedulingIgnoredDuringExecution }}{{ $required = .nodeSelectorTerms }}{{ end }}
{{- end }}
{{- if not (or .Values.nodeSelector $required .Values.allNodes) }}
{{- fail "nodeSelector is empty and affinity requires no label, so every node would get a privileged pod, with a GPU or without: name a label of your GPU nodes, or set allNodes=true" }}
{{- end }}
{{- if and .Values.allNodes (or .Values.nodeSelector $required) }}
{{- fail "allNodes=true, but nodeSelector or affinity asks for a label: set nodeSelector=null, or allNodes=false" }}
{{- end }}
{{- range $key := list "app" "app.kubernetes.io/instance" "app.kubernetes.io/name" "app.kubernetes.io/component" "app.kubernetes.io/version" "app.kubernetes.io/managed-by" "helm.sh/chart" }}
{{- if hasKey $.Values.podLabels $key }}
{{- fail (printf "podLabels names %s, by which the chart finds its own pods: choose another label" $key) }}
{{- end }}
{{- end }}
{{- end }}

{{- /* What is added must not take the place of what the chart sets. */ -}}
{{- define "power-agent.validateExtras" -}}
{{- if and .Values.seLinux.enabled .Values.seLinuxOptions }}
{{- fail "seLinux.enabled=true and seLinuxOptions both say what the labels are: use one of them" }}
{{- end }}
{{- $volumes := list }}
{{- range .Values.extraVolumes }}
{{- if has .name (list "run" "state" "kubelet" "driver" "proc" "sys" "token") }}
{{- fail (printf "extraVolumes names %s, which is a volume of the chart: choose another name" .name) }}
{{- end }}
{{- $volumes = append $volumes .name }}
{{- end }}
{{- $own := dict "NODE_NAME" "nothing: the chart sets it" "WATCH_NAMESPACE" "settings.watchNamespace" "NVIDIA_VISIBLE_DEVICES" "driver.visibleDevices" "NVIDIA_DRIVER_CAPABILITIES" "nothing: the chart sets it" }}
{{- if .Values.driver.libraryPath }}{{ $_ := set $own "LD_LIBRARY_PATH" "driver.libraryPath" }}{{ end }}
{{- if and .Values.supervised .Values.settings.runDir }}{{ $_ := set $own "TMPDIR" "settings.runDir" }}{{ end }}
{{- $places := dict "" .Values "watcher." .Values.watcher "enforcer." .Values.enforcer }}
{{- range $from, $extras := $places }}
{{- range $extras.extraVolumeMounts }}
{{- if not (has .name $volumes) }}
{{- fail (printf "%sextraVolumeMounts names %s, which extraVolumes does not have: add it there (the chart's own volumes stay where they are)" $from .name) }}
{{- end }}
{{- end }}
{{- range $extras.extraEnv }}
{{- if hasPrefix "POWER_AGENT_" .name }}
{{- fail (printf "%sextraEnv names %s: set settings.%s" $from .name (.name | trimPrefix "POWER_AGENT_" | lower | camelcase | untitle)) }}
{{- end }}
{{- with get $own .name }}
{{- fail (printf "%sextraEnv sets what the chart sets; use %s" $from .) }}
{{- end }}
{{- end }}
{{- end }}
{{- include "power-agent.validateOnce" (dict "what" "extraEnv" "field" "name" "lists" (list .Values.extraEnv .Values.watcher.extraEnv) "second" .Values.enforcer.extraEnv "together" .Values.supervised) }}
{{- include "power-agent.validateOnce" (dict "what" "extraVolumeMounts" "field" "mountPath" "lists" (list .Values.extraVolumeMounts .Values.watcher.extraVolumeMounts) "second" .Values.enforcer.extraVolumeMounts "together" .Values.supervised) }}
{{- include "power-agent.validateProbes" . }}
{{- end }}

{{- /* Who names people or places and leaves the switch off believes that it is on. */ -}}
{{- define "power-agent.validateSwitches" -}}
{{- $a := .Values.admission }}{{ $n := .Values.networkPolicy }}
{{- if and (not $a.enabled) (or $a.writers $a.writerGroups) }}
{{- fail "admission.writers or admission.writerGroups say who may write limits, but admission.enabled=false lets everybody: set it to true, or empty the lists" }}
{{- end }}
{{- if and (has "Deny" $a.actions) (has "Warn" $a.actions) }}
{{- fail "admission.actions has Deny and Warn, which the API server does not take together: leave one out" }}
{{- end }}
{{- if and (not $n.enabled) (or $n.from $n.apiServer) }}
{{- fail "networkPolicy.from or networkPolicy.apiServer names peers, but networkPolicy.enabled=false lets everybody: set it to true, or empty the lists" }}
{{- end }}
{{- end }}

{{- define "power-agent.validateMonitoring" -}}
{{- $m := .Values.monitoring }}
{{- if eq (.Values.settings.metricsAddr | default "") "off" }}
{{- range $name := list "podMonitor" "service" "serviceMonitor" "prometheusRule" "dashboard" }}
{{- if (index $m $name).enabled }}
{{- fail (printf "monitoring.%s.enabled=true, but settings.metricsAddr=off serves no metrics: set one of them otherwise" $name) }}
{{- end }}
{{- end }}
{{- if and .Values.networkPolicy.enabled .Values.networkPolicy.from }}
{{- fail "networkPolicy.from names who may scrape, but settings.metricsAddr=off serves no metrics: set one of them otherwise" }}
{{- end }}
{{- end }}
{{- if and $m.serviceMonitor.enabled (not $m.service.enabled) }}
{{- fail "monitoring.serviceMonitor.enabled=true has no Service to look at: set monitoring.service.enabled=true too" }}
{{- end }}
{{- if and $m.serviceMonitor.enabled $m.podMonitor.enabled }}
{{- fail "monitoring.podMonitor and monitoring.serviceMonitor are both enabled, so everything would be scraped and counted twice: enable one of them" }}
{{- end }}
{{- if and (not $m.prometheusRule.enabled) $m.prometheusRule.disabled }}
{{- fail "monitoring.prometheusRule.disabled leaves out alerts, but monitoring.prometheusRule.enabled=false makes none: set it to true, or empty the list" }}
{{- end }}
{{- end }}

{{- /* The same variable or folder twice in one container: the later one would hold, without a word. */ -}}
{{- define "power-agent.validateOnce" -}}
{{- $field := .field }}{{ $what := .what }}
{{- $first := concat (first .lists) (last .lists) }}
{{- $containers := ternary (list (concat $first .second)) (list $first (concat (first .lists) .second)) .together }}
{{- range $containers }}
{{- $seen := list }}
{{- range . }}
{{- $one := trimSuffix "/" (get . $field) }}
{{- if has $one $seen }}
{{- fail (printf "%s says %s twice for one container: leave one out" $what $one) }}
{{- end }}
{{- $seen = append $seen $one }}
{{- end }}
{{- end }}
{{- end }}

{{- define "power-agent.validateProbes" -}}
{{- range $kind, $numbers := .Values.probes.enforcer }}
{{- with $numbers }}
{{- if lt (int .timeoutSeconds) 9 }}
{{- fail (printf "probes.enforcer.%s.timeoutSeconds=%v would end a probe that may ask for 8 seconds: set it to at least 9" $kind .timeoutSeconds) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
