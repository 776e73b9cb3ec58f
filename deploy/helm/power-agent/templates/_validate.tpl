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
