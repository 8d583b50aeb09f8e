{{/* Made from operator/distill_operator/rbac.py, which says what each right is for, by `make crds`. */}}
{{- define "distillation-operator.namespacedRules" -}}
- apiGroups: [distillation-operator.io]
  resources: [distillationjobs]
  verbs: [list, watch, delete]
- apiGroups: [distillation-operator.io]
  resources: [teachers]
  verbs: [list, watch]
- apiGroups: [distillation-operator.io]
  resources: [distillationjobs/status, teachers/status]
  verbs: [patch]
- apiGroups: [distillation-operator.io]
  resources: [distillationjobs/finalizers, teachers/finalizers]
  verbs: [update]
- apiGroups: [""]
  resources: [configmaps, services]
  verbs: [list, create, patch]
- apiGroups: [""]
  resources: [secrets]
  verbs: [create]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [list, create, patch]
- apiGroups: [apps]
  resources: [deployments]
  verbs: [list, watch, create, patch, delete]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [list, watch, create, patch, delete]
- apiGroups: [ray.io]
  resources: [rayclusters]
  verbs: [list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch]
- apiGroups: [""]
  resources: [persistentvolumeclaims]
  verbs: [get]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [list, create, patch]
{{- $groups := dict "scheduler-plugins" "scheduling.x-k8s.io" "volcano" "scheduling.volcano.sh" "kai" "scheduling.run.ai" }}
{{- range .Values.gangSchedulers }}
- apiGroups: [{{ get $groups . }}]
  resources: [podgroups]
  verbs: [list, create, patch, delete]
{{- end }}
{{- if .Values.kueue }}
- apiGroups: [kueue.x-k8s.io]
  resources: [workloads]
  verbs: [list, watch, create, patch, delete]
- apiGroups: [kueue.x-k8s.io]
  resources: [workloads/status]
  verbs: [patch]
{{- end }}
{{- end -}}

{{- define "distillation-operator.clusterRules" -}}
- apiGroups: [storage.k8s.io]
  resources: [storageclasses]
  verbs: [get]
- apiGroups: [apiextensions.k8s.io]
  resources: [customresourcedefinitions]
  verbs: [list, watch]
{{- if .Values.watchNamespaceSelector }}
- apiGroups: [""]
  resources: [namespaces]
  verbs: [list]
{{- end }}
{{- end -}}

{{- define "distillation-operator.kueueRules" -}}
- apiGroups: [kueue.x-k8s.io]
  resources: [resourceflavors, workloadpriorityclasses]
  verbs: [get]
- apiGroups: [scheduling.k8s.io]
  resources: [priorityclasses]
  verbs: [get]
{{- end -}}

{{- define "distillation-operator.leaseRules" -}}
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  verbs: [create]
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  resourceNames: [{{ include "distillation-operator.fullname" . }}]
  verbs: [get, update]
{{- end -}}
