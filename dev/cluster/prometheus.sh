#!/bin/bash
# prometheus.sh start|stop - Debian's Prometheus on the host, scraping the pods of the embedded cluster.
# http://127.0.0.1:9090; data, rules/*.yaml that it loads, and targets.json lie in the cache's folder "prometheus".
# Run "start" again to load changed rules. down.sh stops it too.
. "$(dirname "$0")/lib.sh"

DATA=${DISTILL_PROMETHEUS_DATA:-$CACHE/prometheus}
PORT=${DISTILL_PROMETHEUS_PORT:-9090}
URL=http://127.0.0.1:$PORT

# Debian builds Prometheus without its Kubernetes discovery: a small program of ours writes the targets to a file.
write_config() {
  mkdir -p "$DATA/rules" "$DATA/data"
  cat > "$DATA/prometheus.yml" <<Y
global: {scrape_interval: 2s, scrape_timeout: 2s, evaluation_interval: 5s}
rule_files: ["$DATA/rules/*.yaml"]
scrape_configs:
- job_name: distillation-pods
  # The operator speaks of jobs in other namespaces than its own.
  honor_labels: true
  file_sd_configs: [{files: ["$DATA/targets.json"], refresh_interval: 2s}]
Y
}

start_prometheus() {
  spawn_on_host prometheus-targets "$REPO/operator/.venv/bin/python" "$DEV/cluster/prometheus_targets.py" "$DATA/targets.json"
  spawn_on_host prometheus prometheus --config.file="$DATA/prometheus.yml" --storage.tsdb.path="$DATA/data" --storage.tsdb.retention.time=7d \
    --web.listen-address="127.0.0.1:$PORT" --web.enable-lifecycle --log.level=warn
  wait_for 30 prometheus curl -sf "$URL/-/ready"
}

stop_prometheus() {
  stop prometheus-targets
  stop prometheus
}

case ${1:-} in
  start)
    need_root
    need_command prometheus
    need_command curl
    need_cluster
    [ -x "$REPO/operator/.venv/bin/python" ] || die "operator/.venv is missing: run dev/setup.sh."
    write_config
    if alive prometheus && alive prometheus-targets; then
      step "Prometheus reloads its rules" curl -sSf -X POST "$URL/-/reload"
    else
      ! curl -s -o /dev/null "$URL" || alive prometheus || die "something else listens on port $PORT: set DISTILL_PROMETHEUS_PORT to a free one."
      step "Prometheus on $URL" start_prometheus
    fi
    ;;
  stop) step "stop Prometheus" stop_prometheus ;;
  *) die "say what to do: prometheus.sh start or prometheus.sh stop." ;;
esac
