{{/* The names that all objects are made of. 44 characters leave room for the longest suffix, and for a hash behind it. A Service's
name has no dot and begins with a letter; a release's may. */}}
{{- define "adit.fullname" -}}
{{- $name := .Values.fullnameOverride -}}
{{- if not $name -}}
{{- $name = ternary .Release.Name (printf "%s-%s" .Release.Name .Chart.Name) (contains .Chart.Name .Release.Name) -}}
{{- end -}}
{{- if regexMatch "^[0-9]" $name -}}
{{- $name = printf "adit-%s" $name -}}
{{- end -}}
{{- $name | replace "." "-" | trunc 44 | trimSuffix "-" -}}
{{- end -}}

{{- define "adit.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{ include "adit.selector" . }}
{{- end -}}

{{- define "adit.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{/* Labels or annotations of the user, under those of the chart. */}}
{{- define "adit.under" -}}
{{- toYaml (merge (fromYaml (index . 0)) (index . 1)) -}}
{{- end -}}

{{- define "adit.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ $image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "adit.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "adit.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "adit.fullname" .) "default" .Values.serviceAccount.create) -}}
{{- end -}}

{{/* Whether there is a database of the user's own; whether relays share a database; whether they share a bus, too. "true" or nothing. */}}
{{- define "adit.externalDatabase" -}}
{{- if or .Values.database.url .Values.database.existingSecret }}true{{ end -}}
{{- end -}}
{{- define "adit.sharedDatabase" -}}
{{- if or .Values.dev.enabled (include "adit.externalDatabase" .) }}true{{ end -}}
{{- end -}}
{{- define "adit.hasRedis" -}}
{{- if or .Values.dev.enabled .Values.redis.url .Values.redis.existingSecret }}true{{ end -}}
{{- end -}}
{{- define "adit.cluster" -}}
{{- if and (include "adit.sharedDatabase" .) (include "adit.hasRedis" .) }}true{{ end -}}
{{- end -}}

{{/* How many relays there are when nobody scales. */}}
{{- define "adit.replicas" -}}
{{- if kindIs "invalid" .Values.replicaCount -}}
{{- ternary 2 1 (eq "true" (include "adit.cluster" .)) -}}
{{- else -}}
{{- int64 .Values.replicaCount -}}
{{- end -}}
{{- end -}}

{{/* The fewest relays that there are. */}}
{{- define "adit.fewest" -}}
{{- if .Values.autoscaling.enabled }}{{ int64 .Values.autoscaling.minReplicas }}{{ else }}{{ include "adit.replicas" . }}{{ end -}}
{{- end -}}

{{/* A duration of the configuration in whole seconds, rounded up. */}}
{{- define "adit.seconds" -}}
{{- $number := regexFind "^[0-9]+" . | int64 -}}
{{- $unit := regexFind "[a-z]+$" . -}}
{{- if eq $unit "ms" -}}{{ div (add $number 999) 1000 }}
{{- else if eq $unit "s" -}}{{ $number }}
{{- else if eq $unit "m" -}}{{ mul $number 60 }}
{{- else -}}{{ mul $number 3600 }}
{{- end -}}
{{- end -}}

{{/* The time before SIGTERM, the drain, and 15 s for what follows it: closing tunnels and connections, 3 s each at most. */}}
{{- define "adit.gracePeriod" -}}
{{- add (int64 .Values.preStopSeconds) (int64 (include "adit.seconds" .Values.config.drain_timeout)) 15 -}}
{{- end -}}

{{- define "adit.hosts" -}}
{{- $hosts := .own -}}
{{- if and (not $hosts) .domain -}}
{{- $hosts = list .domain (printf "*.%s" .domain) -}}
{{- end -}}
{{- toJson $hosts -}}
{{- end -}}

{{/* One line of TOML: a JSON text is a TOML text, and whole numbers stay whole. */}}
{{- define "adit.toml" -}}
{{- $indent := "" -}}
{{- range $key, $value := . }}
{{- if kindIs "map" $value }}
{{- else if or (kindIs "float64" $value) (kindIs "int64" $value) (kindIs "int" $value) }}
{{ $key }} = {{ int64 $value }}
{{- else }}
{{ $key }} = {{ toJson $value }}
{{- end }}
{{- end }}
{{- range $key, $value := . }}
{{- if kindIs "map" $value }}

[{{ $key }}]
{{- include "adit.toml" $value }}
{{- end }}
{{- end }}
{{- end -}}

{{/* An environment variable out of a Secret: the user's, or the chart's own. */}}
{{- define "adit.databaseSecret" -}}
{{- if .Values.database.existingSecret -}}
{name: {{ .Values.database.existingSecret | quote }}, key: {{ .Values.database.existingSecretKey | quote }}}
{{- else -}}
{name: {{ include "adit.fullname" . }}, key: DATABASE_URL}
{{- end -}}
{{- end -}}
{{- define "adit.redisSecret" -}}
{{- if .Values.redis.existingSecret -}}
{name: {{ .Values.redis.existingSecret | quote }}, key: {{ .Values.redis.existingSecretKey | quote }}}
{{- else -}}
{name: {{ include "adit.fullname" . }}, key: REDIS_URL}
{{- end -}}
{{- end -}}
{{- define "adit.adminSecretName" -}}
{{- .Values.adminToken.existingSecret | default (printf "%s-admin" (include "adit.fullname" .)) -}}
{{- end -}}
{{- define "adit.adminSecretKey" -}}
{{- ternary .Values.adminToken.existingSecretKey "ADIT_ADMIN_TOKEN" (ne "" .Values.adminToken.existingSecret) -}}
{{- end -}}

{{/* What no schema can say. */}}
{{- define "adit.validate" -}}
{{- $v := .Values -}}
{{- if and $v.database.url $v.database.existingSecret }}
{{- fail "\n\ndatabase.url and database.existingSecret are both set: keep one.\n" }}
{{- end }}
{{- if and $v.redis.url $v.redis.existingSecret }}
{{- fail "\n\nredis.url and redis.existingSecret are both set: keep one.\n" }}
{{- end }}
{{- if and $v.adminToken.value $v.adminToken.existingSecret }}
{{- fail "\n\nadminToken.value and adminToken.existingSecret are both set: keep one.\n" }}
{{- end }}
{{- if and $v.dev.enabled (or (include "adit.externalDatabase" .) $v.redis.url $v.redis.existingSecret) }}
{{- fail "\n\ndev.enabled brings a MariaDB and a Redis of its own: take out database.* and redis.*, or dev.enabled.\n" }}
{{- end }}
{{- if and (include "adit.hasRedis" .) (not (include "adit.sharedDatabase" .)) }}
{{- fail "\n\nredis is set, but relays that share a Redis must share a database: set database.url or database.existingSecret, too.\n" }}
{{- end }}
{{- $many := or (and $v.autoscaling.enabled (gt (int64 $v.autoscaling.maxReplicas) 1)) (gt (int64 (include "adit.replicas" .)) 1) }}
{{- if and $many (not (include "adit.sharedDatabase" .)) }}
{{- fail "\n\nMore than one relay (replicaCount or autoscaling) needs a database that they share: set database.url or database.existingSecret (MySQL or MariaDB), or dev.enabled=true to try it.\n" }}
{{- end }}
{{- if and $many (not (include "adit.hasRedis" .)) }}
{{- fail "\n\nMore than one relay (replicaCount or autoscaling) needs a Redis that they share: set redis.url or redis.existingSecret, or dev.enabled=true to try it.\n" }}
{{- end }}
{{- if and $v.autoscaling.enabled (gt (int64 $v.autoscaling.minReplicas) (int64 $v.autoscaling.maxReplicas)) }}
{{- fail "\n\nautoscaling.minReplicas is more than autoscaling.maxReplicas.\n" }}
{{- end }}
{{- if and $v.autoscaling.enabled (kindIs "invalid" $v.autoscaling.targetCPUUtilizationPercentage) (not $v.autoscaling.exchangesInFlight.enabled) }}
{{- fail "\n\nautoscaling has nothing to scale by: set autoscaling.targetCPUUtilizationPercentage or autoscaling.exchangesInFlight.enabled.\n" }}
{{- end }}
{{- if and $v.ingress.enabled (not $v.config.domain) (not $v.ingress.hosts) }}
{{- fail "\n\ningress.enabled needs to know the host: set config.domain (for it and *.domain) or ingress.hosts.\n" }}
{{- end }}
{{- if and $v.httpRoute.enabled (not $v.config.domain) (not $v.httpRoute.hostnames) }}
{{- fail "\n\nhttpRoute.enabled needs to know the host: set config.domain (for it and *.domain) or httpRoute.hostnames.\n" }}
{{- end }}
{{- if and $v.httpRoute.enabled (not $v.httpRoute.parentRefs) }}
{{- fail "\n\nhttpRoute.enabled needs httpRoute.parentRefs: which Gateway the route belongs to.\n" }}
{{- end }}
{{- end -}}
