{{- /* The router's TLS. Certificates and authorities are Secrets in Envoy's sense: files of the same ConfigMap that name the mounted
files: Envoy watches the folders of those, and reads them again when the kubelet replaces what ..data points to. */ -}}
{{- define "quiver.routerFrontTls" -}}
transport_socket:
  name: envoy.transport_sockets.tls
  typed_config:
    "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
    require_client_certificate: {{ not (empty .Values.tls.clientCaKey) }}
    common_tls_context:
      alpn_protocols: [h2]
      tls_params: {tls_minimum_protocol_version: TLSv1_2}
      tls_certificate_sds_secret_configs: [{{ include "quiver.sdsSecret" "front-certificate" }}]
      {{- if .Values.tls.clientCaKey }}
      validation_context_sds_secret_config: {{ include "quiver.sdsSecret" "front-clients" }}
      {{- end }}
{{- end -}}

{{- define "quiver.routerUpstreamTls" -}}
transport_socket:
  name: envoy.transport_sockets.tls
  typed_config:
    "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
    sni: {{ include "quiver.serverName" . }}
    common_tls_context:
      alpn_protocols: [h2]
      tls_params: {tls_minimum_protocol_version: TLSv1_2}
      {{- if .Values.tls.clientCaKey }}
      tls_certificate_sds_secret_configs: [{{ include "quiver.sdsSecret" "certificate" }}]
      {{- end }}
      combined_validation_context:
        default_validation_context:
          match_typed_subject_alt_names: [{san_type: DNS, matcher: {exact: {{ include "quiver.serverName" . }}}}]
        validation_context_sds_secret_config: {{ include "quiver.sdsSecret" "authority" }}
{{- end -}}

{{- define "quiver.sdsSecret" -}}
{name: {{ . }}, sds_config: {path_config_source: {path: /etc/envoy/{{ . }}.yaml}}}
{{- end -}}

{{- /* The ConfigMap's further files. */ -}}
{{- define "quiver.routerTlsFiles" -}}
{{- $tls := .Values.tls -}}
{{- if $tls.existingSecret -}}
{{- $front := dict "folder" "/etc/envoy-front-tls" "tls" $tls -}}
{{- $own := dict "folder" "/etc/envoy-tls" "tls" $tls -}}
{{ include "quiver.sdsCertificate" (merge (dict "name" "front-certificate") $front) }}
{{ include "quiver.sdsAuthority" (merge (dict "name" "authority" "key" $tls.caKey) $own) }}
{{- if $tls.clientCaKey }}
{{ include "quiver.sdsAuthority" (merge (dict "name" "front-clients" "key" $tls.clientCaKey) $front) }}
{{ include "quiver.sdsCertificate" (merge (dict "name" "certificate") $own) }}
{{- end }}
{{- end -}}
{{- end -}}

{{- define "quiver.sdsCertificate" -}}
{{ .name }}.yaml: |
  resources:
    - "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret
      name: {{ .name }}
      tls_certificate:
        certificate_chain: {filename: {{ .folder }}/{{ .tls.certKey }}}
        private_key: {filename: {{ .folder }}/{{ .tls.keyKey }}}
{{- end -}}

{{- define "quiver.sdsAuthority" -}}
{{ .name }}.yaml: |
  resources:
    - "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret
      name: {{ .name }}
      validation_context:
        trusted_ca: {filename: {{ .folder }}/{{ .key }}}
{{- end -}}
