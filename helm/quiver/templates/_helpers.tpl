{{- /* Names, labels, and the parts that several pods share. */ -}}
{{- define "quiver.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- /* At most 40 characters: what is appended must fit into 63. */ -}}
{{- define "quiver.fullname" -}}
{{- $name := include "quiver.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "quiver.releaseLabels" -}}
app.kubernetes.io/name: {{ include "quiver.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- /* (dict "root" $ "component" "server") */ -}}
{{- define "quiver.selectorLabels" -}}
{{ include "quiver.releaseLabels" .root }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "quiver.labels" -}}
{{ include "quiver.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end -}}

{{- define "quiver.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "quiver.serviceAccountName" -}}
{{- $own := ternary (include "quiver.fullname" .) "default" .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default $own -}}
{{- end -}}

{{- /* What every pod has. */ -}}
{{- define "quiver.podDefaults" -}}
serviceAccountName: {{ include "quiver.serviceAccountName" . }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext: {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- /* Where pods that compute may run. */ -}}
{{- define "quiver.placement" -}}
{{- with .Values.gpu.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- $taint := dict "key" "nvidia.com/gpu" "operator" "Exists" "effect" "NoSchedule" }}
{{- with concat .Values.tolerations (ternary (list $taint) list (gt (int .Values.gpu.count) 0)) }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- /* (dict "root" $ "resources" ...): the GPU beside them. */ -}}
{{- define "quiver.resources" -}}
{{- $resources := deepCopy .resources -}}
{{- if gt (int .root.Values.gpu.count) 0 -}}
{{- $gpu := dict .root.Values.gpu.resource (int .root.Values.gpu.count) -}}
{{- $resources = mergeOverwrite $resources (dict "limits" $gpu) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- /* The environment of a container that computes: no home on a read-only root, as many threads as it asked CPUs for. */ -}}
{{- define "quiver.computeEnv" -}}
- {name: HOME, value: /tmp}
- name: OMP_NUM_THREADS
  valueFrom: {resourceFieldRef: {resource: requests.cpu}}
{{- end -}}

{{- define "quiver.hasModels" -}}
{{- with .Values.model }}{{ if or .volume.existingClaim .volume.size .download.image }}yes{{ end }}{{ end -}}
{{- end -}}

{{- /* (dict "root" $ "name" "adapters" "volume" ...): a claim, or the pod's own scratch space. */ -}}
{{- define "quiver.volume" -}}
- name: {{ .name }}
{{- if or .volume.existingClaim .volume.size }}
  persistentVolumeClaim:
    claimName: {{ .volume.existingClaim | default (printf "%s-%s" (include "quiver.fullname" .root) .name) }}
{{- else }}
  emptyDir: {}
{{- end }}
{{- end -}}

{{- /* A container of the user's beside or before the server; its volumeMounts are left open. (dict "root" $ "spec" {image, command, env, envFrom}) */ -}}
{{- define "quiver.helperContainer" -}}
image: {{ .spec.image }}
{{- with .spec.command }}
command: {{- toYaml . | nindent 2 }}
{{- end }}
env:
  - {name: HOME, value: /tmp}
  {{- with .spec.env }}{{ toYaml . | nindent 2 }}{{ end }}
{{- with .spec.envFrom }}
envFrom: {{- toYaml . | nindent 2 }}
{{- end }}
resources: {{- toYaml .spec.resources | nindent 2 }}
securityContext: {{- toYaml .root.Values.securityContext | nindent 2 }}
volumeMounts:
{{- end -}}

{{- /* The one name that certificates must have. */ -}}
{{- define "quiver.serverName" -}}
{{ include "quiver.fullname" . }}.{{ .Release.Namespace }}.svc
{{- end -}}

{{- /* What clients of the release's Service see, where there is TLS. */ -}}
{{- define "quiver.frontTlsSecret" -}}
{{- $own := ternary .Values.router.tlsSecret "" .Values.router.enabled -}}
{{- $own | default .Values.tls.existingSecret -}}
{{- end -}}

{{- /* A whole Secret, not a file of it: it follows what is replaced. (dict "name" the volume's "secret" the Secret's) */ -}}
{{- define "quiver.secretVolume" -}}
- name: {{ .name }}
  secret: {secretName: {{ .secret }}, defaultMode: 0440}
{{- end -}}
