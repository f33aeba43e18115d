#!/usr/bin/env bash
# Check a running stack as an operator would. Each check prints one line: PASS, FAIL or SKIP, with a reason.
# Exit codes: 0 no FAIL, 1 a FAIL, 2 the checks cannot start.
#
#   scripts/verify.sh                all checks
#   scripts/verify.sh cycle traces   only these, in this order
#
#   KTRDR_API_URL    URL of the service (http://127.0.0.1:8000)
#   KTRDR_REPLICAS   URLs of its replicas, separated by spaces (the service's URL)
#   KTRDR_API_KEY, KTRDR_ADMIN_KEY   keys of the service, if it has any
#   PROMETHEUS_URL   (http://127.0.0.1:9090)   \
#   JAEGER_URL       (http://127.0.0.1:16686)   > checked if they reply; required if set
#   GRAFANA_URL      (http://127.0.0.1:3000)   /
#   GRAFANA_USER, GRAFANA_PASSWORD   login, if the dashboard is not public
#   WAIT_SECONDS     wait for traces and scrapes (30)
#   TRACE_OUTCOMES   outcomes whose newest cycle must have its trace, too: "completed failed cancelled"
#   PYTHON           an interpreter with ktrdr-budget installed (.venv/bin/python)
#
# The script runs one research cycle, at its usual cost. For a moment it sets the agent's limit to $0.01, so that other
# triggers are denied meanwhile; the limit is restored in any case, also if the script is interrupted.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
service=${KTRDR_API_URL:-http://127.0.0.1:8000}
read -r -a replicas <<<"${KTRDR_REPLICAS:-$service}"
prometheus=${PROMETHEUS_URL:-http://127.0.0.1:9090}
jaeger=${JAEGER_URL:-http://127.0.0.1:16686}
grafana=${GRAFANA_URL:-http://127.0.0.1:3000}
python=${PYTHON:-$root/.venv/bin/python}
[[ -x $python || -n ${PYTHON:-} ]] || python=python3
key=${KTRDR_API_KEY:-${KTRDR_ADMIN_KEY:-}}
checks=(ready budget cli metrics gauge cycle ledger counters agreement traces exhaustion prometheus grafana)
passed=0 failed=0 skipped=0

work=$(mktemp -d) || exit 2
body=$work/body       # the last reply
nothing=$work/nothing # an empty document
echo null >"$nothing"
changed_limit=

# --- Results ----------------------------------------------------------------------------------------------------------

pass() { printf 'PASS  %-11s %s\n' "$1" "$2"; ((passed += 1)); }
fail() { printf 'FAIL  %-11s %s\n' "$1" "$2"; ((failed += 1)); }
skip() { printf 'SKIP  %-11s %s\n' "$1" "$2"; ((skipped += 1)); }

# missing NAME URL VARIABLE: report a part without a reply; a fault only if its variable is set.
missing() {
  if [[ -n ${!3:-} ]]; then fail "$1" "no reply from $2 ($3)"; else skip "$1" "no reply from $2"; fi
}

# --- Requests ---------------------------------------------------------------------------------------------------------

# get URL [HEADER]: write the reply to $body; fails unless the status is a success. Keys are passed by standard input,
# because other users can read arguments.
get() {
  : >"$body"
  printf '%s\n' "${2:+header = \"$2\"}" |
    curl --silent --fail-with-body --max-time 10 --config - --output "$body" -- "$1"
}

ask() { get "$1" "${key:+Authorization: Bearer ${key%%,*}}"; }

# of FILE EXPRESSION [WORD...]: evaluate a Python expression of the JSON document d in a file, and of the words w.
of() { "$python" -c "$program" "$@" 2>/dev/null; }
program='
import json, sys
from decimal import Decimal
d, w = json.load(open(sys.argv[1]), parse_float=Decimal), sys.argv[3:]
print(eval(sys.argv[2]))
'

# field EXPRESSION [WORD...]: evaluate an expression of the last reply.
field() { of "$body" "$@"; }

# true_of FILE EXPRESSION [WORD...]
true_of() { [[ $(of "$@") == True ]]; }

# yes EXPRESSION [WORD...]: whether an expression of the last reply is true.
yes() { true_of "$body" "$@"; }

# detail: the error in the last reply.
detail() {
  local output
  output=$(field 'd.get("detail", "")' || head -c 200 "$body")
  echo "${output:-no reply}"
}

# wait_for COMMAND [WORD...]: repeat until it succeeds.
wait_for() {
  local ends=$((SECONDS + ${WAIT_SECONDS:-30}))
  until "$@"; do
    ((SECONDS < ends)) || return 1
    sleep 0.25
  done
}

# sample URL SERIES...: sum these series, exactly as written, of a /metrics page; fails if one is absent.
sample() {
  get "$1/metrics" || return 1
  "$python" -c '
import sys
from decimal import Decimal
values = dict(line.rsplit(" ", 1) for line in open(sys.argv[1]) if not line.startswith("#"))
print(format(sum(Decimal(values[name].strip()) for name in sys.argv[2:]), "f"))
' "$body" "${@:2}" 2>/dev/null
}

ktrdr() { "$python" -m ktrdr_budget.cli --api-url "$service" "$@"; }

# --- Checks -----------------------------------------------------------------------------------------------------------

check_ready() {
  local url
  for url in "$service" "${replicas[@]}"; do
    get "$url/readyz" || { fail ready "$url: $(detail)"; return; }
  done
  pass ready "${#replicas[@]} replica(s), each with its store"
}

check_budget() {
  ask "$service/api/v1/agent/budget" || { fail budget "$(detail)"; return; }
  if yes 'd["daily_limit"] is None or d["remaining"] == max(
      0, d["daily_limit"] - d["today_spend"] - d["held"] - d["unconfirmed"])'; then
    pass budget "$(field "$budget_expression")"
  else
    fail budget "the figures do not add up: $(head -c 300 "$body")"
  fi
}

budget_expression='"{date}: limit {daily_limit}, spent {today_spend}, remaining {remaining}".format(
    **{name: "unlimited" if value is None else value for name, value in d.items()})'

check_agreement() {
  for _ in 1 2 3; do # a cycle may begin or end between two requests
    if replicas_agree; then
      pass agreement 'all replicas have the same agent status'
      return
    fi
  done
  fail agreement "$(cat "$work/output")"
}

replicas_agree() {
  local url output first=
  for url in "${replicas[@]}"; do
    ask "$url/api/v1/agent/status" || { echo "$url: $(detail)" >"$work/output"; return 1; }
    output=$(field '[d["status"], *(c["operation_id"] for c in (*d["active_cycles"], d["last_cycle"]) if c)]')
    [[ -n $output && $output == "${first:=$output}" ]] || {
      echo "$url has $output, another replica has $first" >"$work/output"
      return 1
    }
  done
}

agent_series=(
  'agent_cycles_total{outcome="completed"}' 'agent_cycles_total{outcome="failed"}'
  'agent_cycles_total{outcome="cancelled"}' 'agent_cycle_duration_seconds_count'
  'agent_phase_duration_seconds_count{phase="designing"}' 'agent_phase_duration_seconds_count{phase="training"}'
  'agent_phase_duration_seconds_count{phase="backtesting"}' 'agent_phase_duration_seconds_count{phase="assessing"}'
  'agent_gate_results_total{gate="training",result="pass"}' 'agent_gate_results_total{gate="training",result="fail"}'
  'agent_gate_results_total{gate="backtest",result="pass"}' 'agent_gate_results_total{gate="backtest",result="fail"}'
  'agent_tokens_total{phase="design"}' 'agent_tokens_total{phase="assessment"}' 'agent_budget_spend_total'
)

check_metrics() {
  local url series
  for url in "${replicas[@]}"; do
    for series in "${agent_series[@]}"; do
      sample "$url" "$series" >"$work/value" || { fail metrics "$url/metrics has no $series"; return; }
    done
    [[ $(sample "$url" ktrdr_budget_store_up) == 1.0 ]] || { fail metrics "$url: ktrdr_budget_store_up is not 1"; return; }
    ! grep -q '^ktrdr_budget_adds_up{.*} 0' "$body" || { fail metrics "$url: a window does not add up"; return; }
  done
  pass metrics "${#agent_series[@]} series of the agent on each replica"
}

# The gauge and the budget's figure, each read before and after the other, without spend in between.
check_gauge() {
  local url gauge before after
  [[ $(remaining) != None ]] || { skip gauge 'the budget has no limit'; return; }
  for url in "${replicas[@]}"; do
    for _ in 1 2 3 4 5; do
      before=$(remaining) gauge=$(sample "$url" agent_budget_remaining_dollars) after=$(remaining)
      [[ $before != "$after" ]] || break
    done
    [[ -n $gauge && -n $after ]] || { fail gauge "$url/metrics has no agent_budget_remaining_dollars"; return; }
    true_of "$nothing" 'float(w[0]) == float(w[1])' "$gauge" "$after" || {
      fail gauge "$url: agent_budget_remaining_dollars is $gauge, the budget has $after"
      return
    }
  done
  pass gauge "agent_budget_remaining_dollars is $after on each replica, equal to the budget"
}

remaining() { ask "$service/api/v1/agent/budget" && field 'd["remaining"]'; }

check_cli() {
  local output
  output=$(ktrdr agent budget 2>&1) || { fail cli "$output"; return; }
  [[ $output == *"Today's Spend: $"* && $output == *"Remaining: "* ]] || { fail cli "ktrdr agent budget: $output"; return; }
  output=$(ktrdr agent status 2>&1) || { fail cli "$output"; return; }
  output=$(ktrdr agent cycles --limit 1 2>&1) || { fail cli "$output"; return; }
  pass cli 'ktrdr agent budget, status and cycles'
}

cycle= # the document of this script's cycle

check_cycle() {
  local before after code output
  before=$(spent) || { fail cycle "$(detail)"; return; }
  trigger_when_idle
  code=$?
  output=$(tail -n 1 "$work/errors")
  if ((code == 3)); then skip cycle "$output"; return; fi
  tail -n 1 "$work/cycle" >"$body"
  if ! yes 'd["outcome"] == "completed" or d["reason"] == "gate_failed"'; then
    fail cycle "${output:-$(head -c 300 "$body")}"
    return
  fi
  cycle=$work/cycle.json
  cp "$body" "$cycle"
  output=$(field 'd["operation_id"] + " " + d["outcome"] + ", $" + d["spend"]')
  after=$(spent) || { fail cycle "$(detail)"; return; }
  if true_of "$cycle" 'Decimal(w[1]) - Decimal(w[0]) >= Decimal(d["spend"]) > 0' "$before" "$after"; then
    pass cycle "$output; spent today: \$$before before, \$$after after"
  else
    fail cycle "$output, but spent today was \$$before before and is \$$after after"
  fi
}

# Wait up to a minute for another running cycle.
trigger_when_idle() {
  local ends=$((SECONDS + 60)) code
  while true; do
    ktrdr agent trigger --wait --json >"$work/cycle" 2>"$work/errors"
    code=$?
    ((code == 3 && SECONDS < ends)) && grep -q '"active_cycle_exists"' "$work/cycle" || return "$code"
    sleep 1
  done
}

spent() { ask "$service/api/v1/budgets/agent" && field 'd["spent"]'; }

check_ledger() {
  [[ -n $cycle ]] || { skip ledger 'no cycle was run'; return; }
  local id trace
  id=$(of "$cycle" 'd["operation_id"]')
  trace=$(of "$cycle" 'd["trace_id"]')
  ask "$service/api/v1/budgets/agent/ledger?limit=100" || { fail ledger "$(detail)"; return; }
  if yes 'any(e["hold_id"] == w[0] and (e["trace_id"] or "") == w[1] for e in d["entries"])' "$id" "$trace"; then
    pass ledger "an entry of $id${trace:+ with its trace id}"
  else
    fail ledger "no entry of $id${trace:+ with its trace id $trace}"
  fi
}

check_counters() {
  [[ -n $cycle ]] || { skip counters 'no cycle was run'; return; }
  [[ -n ${KTRDR_REPLICAS:-} ]] || { skip counters 'KTRDR_REPLICAS is not set: one replica alone may have counted it'; return; }
  local url counted cycles=0 tokens=0
  for url in "${replicas[@]}"; do
    counted=$(sample "$url" 'agent_cycles_total{outcome="completed"}' 'agent_cycles_total{outcome="failed"}' || echo 0)
    ((cycles += ${counted%.*}))
    counted=$(sample "$url" 'agent_tokens_total{phase="design"}' 'agent_tokens_total{phase="assessment"}' || echo 0)
    ((tokens += ${counted%.*}))
  done
  if true_of "$cycle" 'int(w[0]) >= 1 and int(w[1]) >= sum(d["tokens"].values()) > 0' "$cycles" "$tokens"; then
    pass counters "the replicas have counted $cycles cycle(s) and $tokens tokens"
  else
    fail counters "the replicas have counted $cycles cycles and $tokens tokens"
  fi
}

check_traces() {
  get "$jaeger/api/services" || { missing traces "$jaeger" JAEGER_URL; return; }
  [[ -n $cycle ]] || { skip traces 'no cycle was run'; return; }
  if [[ -z $(of "$cycle" 'd["trace_id"]') ]]; then
    local why='the cycle has no trace: set OTEL_EXPORTER_OTLP_ENDPOINT for the service'
    if [[ -n ${JAEGER_URL:-} ]]; then fail traces "$why"; else skip traces "$why"; fi
    return
  fi
  local traced=("$cycle") outcome one total=0 outcomes=
  for outcome in ${TRACE_OUTCOMES:-}; do
    [[ $(of "$cycle" 'd["outcome"]') != "$outcome" ]] || continue
    one=$work/$outcome.json
    ask "$service/api/v1/agent/cycles?limit=100" || { fail traces "$(detail)"; return; }
    "$python" -c "$newest_program" "$body" "$outcome" >"$one" 2>/dev/null || { fail traces "no $outcome cycle"; return; }
    traced+=("$one")
  done
  for one in "${traced[@]}"; do
    wait_for trace_is_whole "$one" || { # spans arrive some seconds after their end
      fail traces "cycle $(of "$one" 'd["operation_id"]'): $(tail -n 1 "$work/output")"
      return
    }
    ((total += $(cat "$work/output")))
    outcomes+=" $(of "$one" 'd["outcome"]')"
  done
  pass traces "${#traced[@]} cycle(s),$outcomes: $total spans, found by service ktrdr-backend and operation.id"
}

newest_program='
import json, sys
cycles = json.load(open(sys.argv[1]))["cycles"]
print(json.dumps(next(cycle for cycle in cycles if cycle["outcome"] == sys.argv[2] and cycle["trace_id"])))
'

# trace_is_whole FILE: the traces that Jaeger finds by service and operation.id are those of the cycle in the file.
trace_is_whole() {
  get "$jaeger/api/traces?service=ktrdr-backend&limit=20&tags=$(of "$1" "$tags_expression")"
  "$python" -c "$trace_program" "$body" "$1" >"$work/output" 2>&1
}
tags_expression='__import__("urllib.parse").parse.quote(json.dumps({"operation.id": d["operation_id"]}))'
trace_program='
import json, sys
found, cycle = (json.load(open(name)) for name in sys.argv[1:])
def tags(holder): return {tag["key"]: tag["value"] for tag in holder.get("tags", [])}
traces = {int(data["traceID"], 16): data for data in found.get("data") or sys.exit("no trace has arrived")}
data = traces.get(int(cycle["trace_id"], 16)) or sys.exit("its own trace has not arrived")
names = {span["operationName"] for span in data["spans"]}
phases = {"designing": "design", "training": "training", "backtesting": "backtest", "assessing": "assessment"}
reached = list(phases)[: list(phases).index(cycle["phase"]) + 1]
expected = {"agent.research_cycle", *("agent.phase." + phases[phase] for phase in reached)}
if not cycle["tokens"]["design"]:
    expected.discard("agent.phase.design")  # the trigger has named a strategy
if expected - names:
    sys.exit("no span " + ", ".join(sorted(expected - names)))
[root] = [span for span in data["spans"] if span["operationName"] == "agent.research_cycle"]
if tags(root).get("outcome") != cycle["outcome"]:
    sys.exit("its outcome is " + str(tags(root).get("outcome")) + ", not " + cycle["outcome"])
spans = [span for trace in traces.values() for span in trace["spans"]]
if not any(span["operationName"].startswith("POST ") and span["operationName"].endswith("/agent/trigger") for span in spans):
    sys.exit("the trace of its trigger has not arrived")
ids = {span["spanID"] for span in spans}
for span in spans:
    if {process["serviceName"] for trace in traces.values() for process in trace["processes"].values()} != {"ktrdr-backend"}:
        sys.exit("its service is not ktrdr-backend")
    if (tags(span).get("operation.id"), tags(span).get("operation.type")) != (cycle["operation_id"], "agent_research"):
        sys.exit("span " + span["operationName"] + " has not the operation.id and operation.type of the cycle")
    if any(link["refType"] == "CHILD_OF" and link["spanID"] not in ids for link in span.get("references", [])):
        sys.exit("span " + span["operationName"] + " is an orphan")
print(len(spans))
'

check_exhaustion() {
  exhaust
  check_restored
}

exhaust() {
  local output code url before gauge
  ask "$service/api/v1/budgets/agent" || { fail exhaustion "$(detail)"; return; }
  before=$(field 'd["spent"]')
  # Before the change, so that the way back is known in any case. The limit also ends with the day.
  restore=(clear-limit agent)
  if yes 'd["limit_source"] == "runtime"'; then
    restore=(set-limit agent "$(field 'd["limit"] or "unlimited"')")
    ! yes 'd["limit_until"] is not None' || restore+=(--until "$(field 'd["limit_until"]')")
  fi
  changed_limit=yes
  output=$(ktrdr budget set-limit agent 0.01 --until window 2>&1) || {
    if [[ $output == *KTRDR_ADMIN_KEY* ]]; then
      changed_limit= # rejected
      skip exhaustion "$output"
    else
      fail exhaustion "$output"
    fi
    return
  }
  for url in "${replicas[@]}"; do
    ktrdr --api-url "$url" agent trigger >"$work/answer" 2>"$work/errors"
    code=$?
    cp "$work/answer" "$body"
    ((code != 0)) || ktrdr agent cancel "$(field 'd["operation_id"]')" >"$work/cancelled" 2>&1
    if ((code != 3)) || ! yes 'd["triggered"] is False and d["reason"] == "budget_exhausted"'; then
      fail exhaustion "$url: exit code $code, $(head -c 300 "$work/answer") $(head -c 300 "$work/errors")"
      return
    fi
    output=$(field 'd["message"]')
    gauge=$(sample "$url" agent_budget_remaining_dollars)
    true_of "$nothing" 'float(w[0]) <= 0.01' "$gauge" || { fail exhaustion "$url: agent_budget_remaining_dollars is $gauge"; return; }
  done
  [[ $(spent) == "$before" ]] || { fail exhaustion "a denial has changed the spend: \$$before before"; return; }
  pass exhaustion "$output"
}

check_restored() {
  [[ -n $changed_limit ]] || return
  local output
  if output=$(restore_limit 2>&1); then
    changed_limit=
    ask "$service/api/v1/budgets/agent" && pass restored "the limit is \$$(field 'd["limit"] or "unlimited"') again"
  else
    fail restored "$output (ktrdr budget ${restore[*]})"
  fi
}

restore_limit() { ktrdr budget "${restore[@]}" >"$work/restored"; }

# query EXPRESSION: an instant query; the result goes to $body.
query() {
  get "$prometheus/api/v1/query?query=$("$python" -c 'import sys, urllib.parse as u; print(u.quote(sys.argv[1]))' "$1")" &&
    yes 'd["status"] == "success"'
}

query_is_least() { query "$1" && yes 'float(d["data"]["result"][0]["value"][1]) >= float(w[0])' "$2"; }

check_prometheus() {
  get "$prometheus/-/ready" || { missing prometheus "$prometheus" PROMETHEUS_URL; return; }
  local least=0
  [[ -z $cycle ]] || least=1
  wait_for query_is_least 'sum(agent_cycles_total)' "$least" || { # after the next scrape
    fail prometheus "sum(agent_cycles_total) is not at least $least: $(head -c 300 "$body")"
    return
  }
  query 'up and on(instance) agent_cycles_total' || { fail prometheus "$(head -c 300 "$body")"; return; }
  local instances
  instances=$(field 'len({r["metric"]["instance"] for r in d["data"]["result"]})')
  query 'up == 0' || { fail prometheus "$(head -c 300 "$body")"; return; }
  yes 'not d["data"]["result"]' || { fail prometheus "down: $(field '[r["metric"]["instance"] for r in d["data"]["result"]]')"; return; }
  get "$prometheus/api/v1/rules" || { fail prometheus "$(head -c 300 "$body")"; return; }
  yes 'all(r["health"] != "err" for g in d["data"]["groups"] for r in g["rules"])' || { fail prometheus 'a rule fails'; return; }
  pass prometheus "$instances replica(s) scraped, $(field 'sum(len(g["rules"]) for g in d["data"]["groups"])') rules loaded"
}

check_grafana() {
  get "$grafana/api/health" || { missing grafana "$grafana" GRAFANA_URL; return; }
  local login=
  [[ -z ${GRAFANA_USER:-} ]] || login="Authorization: Basic $(printf %s "$GRAFANA_USER:${GRAFANA_PASSWORD:-}" | base64 | tr -d '\n')"
  get "$grafana/api/dashboards/uid/agent-research" "$login" || { fail grafana "no dashboard agent-research: $(head -c 200 "$body")"; return; }
  pass grafana "\"$(field 'd["dashboard"]["title"]')\" with $(field 'len(d["dashboard"]["panels"])') panels"
}

# --- Main -------------------------------------------------------------------------------------------------------------

leave() {
  local code=$?
  trap '' INT TERM HUP
  [[ -z $changed_limit ]] || restore_limit || echo "verify: the limit was NOT restored: ktrdr budget ${restore[*]}" >&2
  rm -rf "$work"
  exit "$code"
}
trap leave EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

command -v curl >/dev/null || { echo 'verify: curl is needed' >&2; exit 2; }
"$python" -c 'import ktrdr_budget.cli' 2>/dev/null || {
  echo "verify: $python has no ktrdr-budget; set PYTHON" >&2
  exit 2
}

for check in "$@"; do
  [[ " ${checks[*]} " == *" $check "* ]] || { echo "verify: no check $check; there are ${checks[*]}" >&2; exit 2; }
done
for check in "${@:-${checks[@]}}"; do
  "check_$check"
done
printf 'verify: %d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
((failed == 0))
