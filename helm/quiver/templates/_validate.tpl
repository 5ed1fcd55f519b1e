{{- /* Refuses values that contradict each other, before anything is created. What one value alone may be is in values.schema.json. */ -}}
{{- define "quiver.validate" -}}
{{- $v := .Values -}}
{{- $most := ternary (int $v.autoscaling.maxReplicas) (int $v.replicaCount) $v.autoscaling.enabled -}}
{{- range $name, $volume := dict "model" $v.model.volume "adapters" $v.adapters.volume -}}
  {{- $shared := has "ReadWriteMany" $volume.accessModes -}}
  {{- if and (gt $most 1) $volume.size (not $volume.existingClaim) (not $shared) -}}
    {{- fail (printf "%d replicas share the %s volume: %s.volume.accessModes must hold ReadWriteMany" $most $name $name) -}}
  {{- end -}}
{{- end -}}
{{- if and (gt $most 1) $v.adapters.state.existingClaim -}}
  {{- fail (printf "%d replicas cannot share adapters.state.existingClaim: each server keeps its own state" $most) -}}
{{- end -}}
{{- if and (hasPrefix "/models/" $v.model.path) (not (include "quiver.hasModels" .)) -}}
  {{- fail (printf "model.path %s lies on a volume: set model.volume.existingClaim, or model.download.image" $v.model.path) -}}
{{- end -}}
{{- if and (include "quiver.hasModels" .) (not (hasPrefix "/models/" $v.model.path)) -}}
  {{- fail (printf "model.path %s: a model from a volume or a download lies under /models/" $v.model.path) -}}
{{- end -}}
{{- if and (not $v.tls.existingSecret) (or $v.tls.clientCaKey $v.router.tlsSecret) -}}
  {{- fail "tls.clientCaKey and router.tlsSecret need the servers' TLS: set tls.existingSecret" -}}
{{- end -}}
{{- if and $v.tokens.testKey (not $v.tokens.existingSecret) -}}
  {{- fail "tokens.testKey is a key of tokens.existingSecret, which is not set" -}}
{{- end -}}
{{- if and $v.autoscaling.enabled (gt (int $v.autoscaling.minReplicas) (int $v.autoscaling.maxReplicas)) -}}
  {{- fail "autoscaling.minReplicas is greater than autoscaling.maxReplicas" -}}
{{- end -}}
{{- if and $v.metrics.serviceMonitor.enabled $v.networkPolicy.enabled (not $v.networkPolicy.metrics) -}}
  {{- fail "metrics.serviceMonitor is on and networkPolicy lets nobody read metrics: name Prometheus in networkPolicy.metrics" -}}
{{- end -}}
{{- if and $v.metrics.otlpEndpoint $v.networkPolicy.enabled (not $v.networkPolicy.traces) -}}
  {{- fail "metrics.otlpEndpoint is set and networkPolicy lets no traces out: name the collector in networkPolicy.traces" -}}
{{- end -}}
{{- if $v.inferencePool.enabled -}}
  {{- if not $v.inferencePool.pickerName -}}
    {{- fail "inferencePool.pickerName: name the endpoint picker's Service" -}}
  {{- end -}}
  {{- if and (eq $v.inferencePool.protocol "http") (not $v.ports.http) -}}
    {{- fail "inferencePool.protocol http forwards to ports.http, which is 0" -}}
  {{- end -}}
  {{- if $v.tls.existingSecret -}}
    {{- fail "an InferencePool knows no TLS to its pods: inferencePool.enabled and tls.existingSecret exclude each other" -}}
  {{- end -}}
  {{- if and $v.networkPolicy.enabled (not $v.networkPolicy.metrics) -}}
    {{- fail "inferencePool: the endpoint picker reads the servers' metrics: name it in networkPolicy.metrics" -}}
  {{- end -}}
{{- end -}}
{{- if $v.training.jobs -}}
  {{- if not (or $v.adapters.volume.existingClaim $v.adapters.volume.size) -}}
    {{- fail "training.jobs put adapters into the served volume: adapters.volume needs a size or an existingClaim" -}}
  {{- end -}}
  {{- if eq (empty $v.training.data.existingClaim) (empty $v.training.data.configMap) -}}
    {{- fail "training.jobs need rows: set one of training.data.existingClaim and training.data.configMap" -}}
  {{- end -}}
  {{- range $v.training.jobs -}}
    {{- if and (gt (int (default 1 .nodes)) 1) (not (has "ReadWriteMany" $v.adapters.volume.accessModes)) -}}
      {{- fail (printf "training.jobs: the %d nodes of %s share the adapters volume: adapters.volume.accessModes must hold ReadWriteMany" (int .nodes) .name) -}}
    {{- end -}}
  {{- end -}}
  {{- if and $v.model.download.image (not $v.model.volume.existingClaim) (not $v.model.volume.size) -}}
    {{- fail "training.jobs need the base too: give model.volume a size or an existingClaim" -}}
  {{- end -}}
{{- end -}}
{{- end -}}
