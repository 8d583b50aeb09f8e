{{- define "distillation-operator.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 53 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 53 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "distillation-operator.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "distillation-operator.labels" -}}
{{ include "distillation-operator.selector" . }}
app.kubernetes.io/part-of: distillation-operator
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* Values that an earlier chart did not have are absent after `helm upgrade --reuse-values`: hence the defaults. */}}
{{- define "distillation-operator.replicas" -}}
{{- .Values.replicas | default 1 -}}
{{- end -}}

{{/* Not empty when the operator works only while it holds a Lease. */}}
{{- define "distillation-operator.leaderElection" -}}
{{- if or (ne (toString (.Values.leaderElection).enabled) "false") (gt (int .Values.replicas) 1) -}}true{{- end -}}
{{- end -}}

{{- define "distillation-operator.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "distillation-operator.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- required "serviceAccount.name is needed when serviceAccount.create is false" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* A map as KEY=VALUE,KEY=VALUE. */}}
{{- define "distillation-operator.pairs" -}}
{{- $pairs := list -}}
{{- range $key, $value := . }}{{ $pairs = append $pairs (printf "%s=%s" $key $value) }}{{ end -}}
{{- join "," $pairs -}}
{{- end -}}

{{- define "distillation-operator.workersImage" -}}
{{- .Values.workersImage | default (printf "distillation-workers:%s" .Chart.AppVersion) -}}
{{- end -}}

{{/* Not empty when the operator's ServiceAccount is held by a policy: ValidatingAdmissionPolicy is v1 since 1.30. */}}
{{- define "distillation-operator.operatorPolicy" -}}
{{- $served := semverCompare ">=1.30.0-0" .Capabilities.KubeVersion.Version -}}
{{- if and $served (ne (toString ((.Values.policies).operator).enabled) "false") -}}true{{- end -}}
{{- end -}}
