"""What the chart, the compose file and what goes with them promise, checked on what is rendered. See tests/chart/run."""

import base64
import copy
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
import urllib.request
from pathlib import Path

import helm_python as helm
import jsonschema
import kubernetes_validate
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm/adit"
NAMESPACE = "prod"
# Names that people give, and names that Helm allows and objects do not.
RELEASES = ["adit", "a", "my-adit-2", "9.lives", "x" * 53, "abcdefghijklmnopqrstuvwxyz.0123456789-abcdefghijklmno"]
KUBERNETES = ["1.25", "1.37"]

checks, skipped = [], []


class Skip(Exception):
    pass


def check(function):
    checks.append(function)
    return function


# ---- reading and rendering


class Strict(yaml.SafeLoader):
    """YAML in which a key is there once."""


def once(loader, node, deep=False):
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    twice = {str(key) for key in keys if keys.count(key) > 1}
    assert not twice, f"keys that are there twice: {twice}"
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, once)


def read(path):
    return yaml.load((ROOT / path).read_text(), Strict)


class Rendered:
    def __init__(self, chart, values, release):
        chart.validate_schema(values)
        texts = chart.render(values, name=release, namespace=NAMESPACE)
        self.notes = next(text for path, text in texts.items() if path.endswith("NOTES.txt"))
        self.objects = []
        for path, text in texts.items():
            if not path.endswith("NOTES.txt"):
                self.objects += [it for it in yaml.load_all(text, Strict) if it]
        self.values = chart.merge_values(values)

    def kind(self, kind, component=None):
        found = [it for it in self.objects if it["kind"] == kind]
        return [it for it in found if component in (None, labels(it).get("app.kubernetes.io/component"))]

    def one(self, kind, component=None):
        found = self.kind(kind, component)
        assert len(found) == 1, f"{len(found)} {kind} {component or ''}"
        return found[0]

    def pods(self):
        """Every pod that the objects make: where it is written, its metadata and its spec."""
        for it in self.objects:
            where = f"{it['kind']} {it['metadata']['name']}"
            if it["kind"] == "Pod":
                yield where, it["metadata"], it["spec"]
            elif "template" in it.get("spec", {}):
                yield where, it["spec"]["template"]["metadata"], it["spec"]["template"]["spec"]


def labels(it):
    return it["metadata"].get("labels", {})


def matches(selector, found):
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In", expression
        if found.get(expression["key"]) not in expression["values"]:
            return False
    return selector.get("matchLabels", {}).items() <= found.items()


def hooks(it):
    return it["metadata"].get("annotations", {}).get("helm.sh/hook", "")


def containers(spec):
    return spec.get("initContainers", []) + spec["containers"]


def seconds(duration):
    number, unit = re.fullmatch(r"(\d+)(ms|s|m|h)", duration).groups()
    return int(number) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[unit]


CHART_HANDLE = helm.Chart.load(str(CHART))
MATRIX = {path.stem.removesuffix("-values"): yaml.safe_load(path.read_text()) for path in sorted((CHART / "ci").glob("*.yaml"))}
_cache = {}


def render(values, release="adit"):
    key = json.dumps([values, release], sort_keys=True)
    if key not in _cache:
        _cache[key] = Rendered(CHART_HANDLE, values, release)
    return _cache[key]


def each():
    for name, values in MATRIX.items():
        for release in RELEASES:
            yield f"{name}, release {release}", render(values, release)


def everywhere(function):
    """A check of one rendering, made of all of them."""

    def all_of_them():
        for what, it in each():
            try:
                function(it)
            except Exception as error:
                raise AssertionError(f"{what}: {error}") from error

    all_of_them.__doc__ = function.__doc__
    checks.append(all_of_them)
    return function


# ---- the chart as a whole


@check
def lint():
    """the chart passes helm lint with every values file of the matrix"""
    for name, values in {"no values": {}, **MATRIX}.items():
        report = helm.lint(str(CHART), values, strict=True)
        worst = [it for it in report["messages"] if it["severity"] >= 2]
        assert not worst and not report["errors"], f"{name}: {worst} {report['errors']}"


@check
def package():
    """it can be packaged, and the package renders the same"""
    with tempfile.TemporaryDirectory() as directory:
        helm.package(str(CHART), destination=directory)
        (path,) = Path(directory).glob("*.tgz")
        values = MATRIX["dev-full"]
        with helm.Chart.load(str(path)) as packaged:
            assert steady(Rendered(packaged, values, "adit").objects) == steady(render(values).objects)


def steady(objects):
    """Without the admin token that is made anew where there is no cluster to look it up in."""
    objects = copy.deepcopy(objects)
    for it in objects:
        if it["kind"] == "Secret" and it["metadata"]["name"].endswith("-admin"):
            it.pop("data", None)
    return objects


@check
def same_twice():
    """rendered twice it is the same, but for an admin token that nobody gave"""
    for name, values in MATRIX.items():
        once, again = (Rendered(CHART_HANDLE, values, "adit").objects for _ in range(2))
        assert steady(once) == steady(again), name
        if values.get("adminToken"):
            assert once == again, name


# ---- every object of every rendering

CUSTOM = {
    "ServiceMonitor": {"selector", "endpoints"},
    "PrometheusRule": {"groups"},
    "HTTPRoute": {"parentRefs", "hostnames", "rules"},
}


@everywhere
def valid(it):
    """every object is valid by the schemas of Kubernetes 1.25 and 1.37, strictly"""
    for found in it.objects:
        where = f"{found['kind']} {found['metadata']['name']}"
        if found["kind"] in CUSTOM:
            # Their schemas are not in Kubernetes.
            assert set(found) == {"apiVersion", "kind", "metadata", "spec"}, where
            assert set(found["spec"]) == CUSTOM[found["kind"]], where
            continue
        key = ("valid", json.dumps(found, sort_keys=True))
        if key in _cache:
            continue
        for version in KUBERNETES:
            try:
                kubernetes_validate.validate(found, version, strict=True)
            except jsonschema.ValidationError as error:
                raise AssertionError(f"{where}, Kubernetes {version}: {'.'.join(map(str, error.path))}: {error.message}") from None
        _cache[key] = True


@everywhere
def names(it):
    """names are unique, short enough, and those of Services begin with a letter"""
    seen = set()
    for found in it.objects:
        kind, name = found["kind"], found["metadata"]["name"]
        assert (kind, name) not in seen, f"{kind} {name} twice"
        seen.add((kind, name))
        pattern = r"[a-z]([-a-z0-9]*[a-z0-9])?" if kind == "Service" else r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
        assert re.fullmatch(pattern, name) and len(name) <= 63, f"{kind} {name}"
        # A StatefulSet's name and a hash are the value of a label.
        assert kind != "StatefulSet" or len(name) <= 52, f"{kind} {name}"
        for value in labels(found).values():
            assert isinstance(value, str) and re.fullmatch(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?", value) and len(value) <= 63, value


@everywhere
def hardened(it):
    """no container is root, writes to its root file system, or may anything; no pod has a token"""
    for where, _, spec in it.pods():
        pod = spec["securityContext"]
        assert pod["runAsNonRoot"] is True and pod["runAsUser"] > 0, where
        assert pod["seccompProfile"]["type"] == "RuntimeDefault", where
        assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False, where
        for container in containers(spec):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False and context["readOnlyRootFilesystem"] is True, where
            assert context["capabilities"] == {"drop": ["ALL"]} and not context.get("privileged"), where
            assert container["resources"]["requests"] and container["resources"]["limits"]["memory"], where
            assert re.search(r"(:[^:/]+|@sha256:[0-9a-f]{64})$", container["image"]), container["image"]
            assert not container["image"].endswith(":latest"), container["image"]
    for account in it.kind("ServiceAccount"):
        assert account["automountServiceAccountToken"] is False


@everywhere
def secrets_stay_secret(it):
    """no secret is in an object that is not a Secret, nor in the notes; each reference leads somewhere"""
    outside = json.dumps([found for found in it.objects if found["kind"] != "Secret"]) + it.notes
    values = it.values
    planted = [values["database"]["url"], values["redis"]["url"], values["adminToken"]["value"]]
    for text in planted + ["s3cr3t"] + ([values["dev"]["password"]] if values["dev"]["enabled"] else []):
        assert not text or text not in outside and json.dumps(text)[1:-1] not in outside, text
        assert not text or base64.b64encode(text.encode()).decode() not in outside, text
    own = {s["metadata"]["name"]: (set(s.get("data", {})) | set(s.get("stringData", {})), s) for s in it.kind("Secret")}
    users = {values[it]["existingSecret"] for it in ("database", "redis", "adminToken")}
    for where, metadata, spec in it.pods():
        for container in containers(spec):
            for variable in container.get("env", []):
                found = variable.get("valueFrom", {}).get("secretKeyRef")
                if not found or found["name"] in users - {""}:
                    continue
                assert found["name"] in own and found["key"] in own[found["name"]][0], f"{where}: {found}"
    admin = own.get(next((n for n in own if n.endswith("-admin")), ""))
    if admin:
        token = base64.b64decode(admin[1]["data"]["ADIT_ADMIN_TOKEN"]).decode()
        assert token == values["adminToken"]["value"] or re.fullmatch(r"adit_[A-Za-z0-9]{43}", token)


@everywhere
def hooks_need_nothing_of_the_release(it):
    """the migration runs before anything of the release exists: it uses nothing of it but its own Secret"""
    external = it.values["database"]["url"] or it.values["database"]["existingSecret"]
    jobs = it.kind("Job")
    assert len(jobs) == (1 if external and it.values["migrations"]["enabled"] else 0)
    for job in jobs:
        assert set(hooks(job).split(",")) == {"pre-install", "pre-upgrade"}
        spec = job["spec"]["template"]["spec"]
        assert spec["containers"][0]["args"] == ["migrate"] and "serviceAccountName" not in spec
        assert not [v for v in spec.get("volumes", []) if v not in it.values["extraVolumes"]]
        reference = next(v for v in spec["containers"][0]["env"] if v["name"] == "DATABASE_URL")["valueFrom"]["secretKeyRef"]
        if not it.values["database"]["existingSecret"]:
            (secret,) = [s for s in it.kind("Secret") if s["metadata"]["name"] == reference["name"]]
            assert hooks(secret) == hooks(job)
            weight = lambda found: int(found["metadata"]["annotations"]["helm.sh/hook-weight"])
            assert weight(secret) < weight(job)
    if it.values["dev"]["enabled"]:
        (init,) = it.one("Deployment", "relay")["spec"]["template"]["spec"]["initContainers"]
        assert "adit migrate" in init["command"][-1]


@everywhere
def relay(it):
    """the relay is probed on its admin port, drains before it is killed, and spreads"""
    deployment = it.one("Deployment", "relay")
    spec = deployment["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": 8080, "admin": 9090} and container["args"] == ["serve"]
    for probe, path in (("startupProbe", "/healthz"), ("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")):
        assert container[probe]["httpGet"] == {"path": path, "port": "admin"}, probe
    pause = it.values["preStopSeconds"]
    assert ("lifecycle" in container) == (pause > 0)
    if pause:
        assert container["lifecycle"]["preStop"]["exec"]["command"] == ["/bin/sleep", str(pause)]
    # What follows the drain: tunnels and connections may take 3 s each to close.
    needed = pause + seconds(it.values["config"]["drain_timeout"]) + 6
    assert spec["terminationGracePeriodSeconds"] > needed, spec["terminationGracePeriodSeconds"]
    assert spec["topologySpreadConstraints"]
    for constraint in [] if it.values["topologySpreadConstraints"] else spec["topologySpreadConstraints"]:
        assert matches(constraint["labelSelector"], labels(deployment["spec"]["template"]))
    annotations = deployment["spec"]["template"]["metadata"]["annotations"]
    assert annotations["checksum/config"] and annotations["checksum/secrets"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in spec["volumes"]}


@everywhere
def scaling(it):
    """relays that share a bus are replaced one by one, others never overlap; a budget where there are several"""
    deployment = it.one("Deployment", "relay")
    values = it.values
    shared = values["dev"]["enabled"] or all(values[x]["url"] or values[x]["existingSecret"] for x in ("database", "redis"))
    strategy = deployment["spec"]["strategy"]
    if shared:
        assert strategy == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    else:
        assert strategy == {"type": "Recreate"}
    scaled = values["autoscaling"]["enabled"]
    assert ("replicas" in deployment["spec"]) != scaled and len(it.kind("HorizontalPodAutoscaler")) == scaled
    fewest = values["autoscaling"]["minReplicas"] if scaled else deployment["spec"]["replicas"]
    assert shared or fewest == 1
    budgets = it.kind("PodDisruptionBudget")
    assert bool(budgets) == (values["podDisruptionBudget"]["enabled"] and fewest > 1), f"{len(budgets)} budgets, {fewest} relays"
    for budget in budgets:
        assert matches(budget["spec"]["selector"], labels(deployment["spec"]["template"]))
        assert budget["spec"]["maxUnavailable"] == values["podDisruptionBudget"]["maxUnavailable"]
    for scaler in it.kind("HorizontalPodAutoscaler"):
        assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
        custom = [m["pods"] for m in scaler["spec"]["metrics"] if m["type"] == "Pods"]
        assert bool(custom) == values["autoscaling"]["exchangesInFlight"]["enabled"]
        cpu = [m for m in scaler["spec"]["metrics"] if m["type"] == "Resource"]
        assert bool(cpu) == (values["autoscaling"].get("targetCPUUtilizationPercentage") is not None)
        for metric in custom:
            assert metric["metric"]["name"] in METRICS, metric
            assert re.fullmatch(r"[0-9]+", metric["target"]["averageValue"]), metric


@everywhere
def selectors_lead_somewhere(it):
    """Services, policies and monitors select what they are for, and no other"""
    pods = [(metadata["labels"], spec) for _, metadata, spec in it.pods()]
    for service in it.kind("Service"):
        found = [spec for pod, spec in pods if service["spec"]["selector"].items() <= pod.items()]
        assert len(found) == 1, f"Service {service['metadata']['name']} selects {len(found)}"
        named = {port["name"] for container in found[0]["containers"] for port in container.get("ports", [])}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= named
    for found in it.kind("Deployment") + it.kind("StatefulSet"):
        assert matches(found["spec"]["selector"], labels(found["spec"]["template"]))
    admin, public = it.one("Service", "admin"), it.one("Service", "relay")
    assert admin["spec"]["type"] == "ClusterIP" and [p["targetPort"] for p in admin["spec"]["ports"]] == ["admin"]
    assert [p["targetPort"] for p in public["spec"]["ports"]] == ["http"], "the admin port is never public"
    for monitor in it.kind("ServiceMonitor"):
        found = [s for s in it.kind("Service") if matches(monitor["spec"]["selector"], labels(s))]
        assert found == [admin] and monitor["spec"]["endpoints"][0]["port"] == "admin"
    for policy in it.kind("NetworkPolicy"):
        assert [pod for pod, _ in pods if matches(policy["spec"]["podSelector"], pod)]
    assert bool(it.kind("NetworkPolicy")) == it.values["networkPolicy"]["enabled"]
    if it.values["networkPolicy"]["enabled"] and it.values["dev"]["enabled"]:
        (inner,) = [p for p in it.kind("NetworkPolicy") if p["metadata"]["name"].endswith("-dev")]
        guarded = [pod["app.kubernetes.io/component"] for pod, _ in pods if matches(inner["spec"]["podSelector"], pod)]
        assert sorted(guarded) == ["mariadb", "redis"]


@everywhere
def routes(it):
    """Ingress and HTTPRoute take the domain and its wildcard to the public Service"""
    public, domain = it.one("Service", "relay"), it.values["config"]["domain"]
    both = {domain, f"*.{domain}"}
    assert len(it.kind("Ingress")) == it.values["ingress"]["enabled"]
    for ingress in it.kind("Ingress"):
        assert {rule["host"] for rule in ingress["spec"]["rules"]} == both
        for rule in ingress["spec"]["rules"]:
            (path,) = rule["http"]["paths"]
            assert path["backend"]["service"] == {"name": public["metadata"]["name"], "port": {"name": "http"}}
        if it.values["ingress"]["tlsSecret"]:
            assert set(ingress["spec"]["tls"][0]["hosts"]) == both
    assert len(it.kind("HTTPRoute")) == it.values["httpRoute"]["enabled"]
    for route in it.kind("HTTPRoute"):
        assert set(route["spec"]["hostnames"]) == both
        (rule,) = route["spec"]["rules"]
        assert rule["backendRefs"] == [{"name": public["metadata"]["name"], "port": public["spec"]["ports"][0]["port"]}]


@everywhere
def configuration(it):
    """the relay's file says what the values say, in keys that the relay knows"""
    (mapped,) = [c for c in it.kind("ConfigMap") if "relay.toml" in c["data"]]
    assert tomllib.loads(mapped["data"]["relay.toml"]) == it.values["config"]
    known = set(re.findall(r'env = "([A-Z_]+)"', "\n".join(p.read_text() for p in (ROOT / "src/cli").glob("*.rs"))))
    assert "ADIT_LISTEN" in known
    for where, _, spec in it.pods():
        for container in containers(spec):
            for variable in container.get("env", []):
                if container["name"] == "relay" and variable not in it.values["extraEnv"]:
                    assert variable["name"] in known or variable["name"].startswith("OTEL_"), variable["name"]
        environment = {v["name"]: v.get("value") for c in containers(spec) if c["name"] == "relay" for v in c.get("env", [])}
        traces = it.values["traces"]
        if environment:
            assert environment.get("OTEL_EXPORTER_OTLP_ENDPOINT", "") == traces["endpoint"], where
            assert not traces["endpoint"] or environment["OTEL_TRACES_SAMPLER"] == traces["sampler"], where


@everywhere
def helm_test(it):
    """there is a test that goes through a tunnel"""
    pod = it.one("Pod", "test")
    assert hooks(pod) == "test"
    script = pod["spec"]["containers"][0]["args"][0]
    environment = {v["name"]: v.get("value") for v in pod["spec"]["containers"][0]["env"]}
    services = {f"http://{s['metadata']['name']}:{s['spec']['ports'][0]['port']}" for s in it.kind("Service")}
    assert {environment["ADMIN"], environment["PUBLIC"]} <= services
    assert subprocess.run(["sh", "-n"], input=script, text=True, capture_output=True).returncode == 0


# ---- what is refused

REFUSED = {
    "replicas without a database": ({"replicaCount": 2}, "needs a database"),
    "replicas without Redis": ({"replicaCount": 2, "database": {"url": "mysql://a:b@c/d"}}, "needs a Redis"),
    "autoscaling without a database": ({"autoscaling": {"enabled": True}}, "needs a database"),
    "autoscaling from one without Redis": ({"autoscaling": {"enabled": True, "minReplicas": 1}, "database": {"existingSecret": "x"}}, "needs a Redis"),
    "Redis without a shared database": ({"redis": {"url": "redis://r"}}, "must share a database"),
    "two databases": ({"database": {"url": "mysql://a:b@c/d", "existingSecret": "x"}}, "keep one"),
    "two Redis": ({"database": {"existingSecret": "x"}, "redis": {"url": "redis://r", "existingSecret": "x"}}, "keep one"),
    "two admin tokens": ({"adminToken": {"value": "a", "existingSecret": "x"}}, "keep one"),
    "dev beside a database": ({"dev": {"enabled": True}, "database": {"existingSecret": "x"}}, "dev.enabled"),
    "the most are fewer than the fewest": ({"dev": {"enabled": True}, "autoscaling": {"enabled": True, "minReplicas": 5, "maxReplicas": 3}}, "more than"),
    "nothing to scale by": ({"dev": {"enabled": True}, "autoscaling": {"enabled": True, "targetCPUUtilizationPercentage": None}}, "nothing to scale by"),
    "an Ingress without a host": ({"ingress": {"enabled": True}}, "config.domain"),
    "a route without a host": ({"httpRoute": {"enabled": True, "parentRefs": [{"name": "x"}]}}, "config.domain"),
    "a route without a Gateway": ({"httpRoute": {"enabled": True}, "config": {"domain": "a.b"}}, "parentRefs"),
}


@check
def refused_by_a_sentence():
    """what cannot work is refused by a sentence that says what to do"""
    for what, (values, said) in REFUSED.items():
        try:
            Rendered(CHART_HANDLE, values, "adit")
        except helm.HelmError as error:
            assert said in str(error), f"{what}: {error}"
        else:
            raise AssertionError(f"not refused: {what}")


BAD = [
    {"replicaCount": -1}, {"replicaCount": "2"}, {"replicaCount": 1.5}, {"image": {"tag": "a b"}}, {"image": {"repository": ""}},
    {"config": {"drain_timeout": 60}}, {"config": {"drain_timeout": "60"}}, {"config": {"drain_timeout": "1m30s"}},
    {"config": {"drain_timeout": "25h"}}, {"config": {"drain_timeout": "86401s"}}, {"config": {"domain": "https://a.b"}},
    {"config": {"domain": "*.a.b"}}, {"config": {"public_url": "a.b"}}, {"config": {"trusted_proxies": "10.0.0.0/8"}},
    {"config": {"trusted_proxies": ["10/8x"]}}, {"config": {"http": {"max_target": "8KB"}}}, {"config": {"log": {"format": "xml"}}}, {"config": {"cors": {"origins": ["app.example.org"]}}},
    {"config": {"http": {"max_headers": 0}}}, {"database": {"url": "postgres://a"}}, {"database": {"url": "sqlite:x"}},
    {"redis": {"url": "http://r"}}, {"adminToken": {"value": "two\nlines"}}, {"dev": {"password": "a/b:c@d1"}}, {"dev": {"enabled": "yes"}},
    {"service": {"type": "ExternalName"}}, {"service": {"port": 0}}, {"service": {"port": 65536}}, {"ingress": {"hosts": ["A_b"]}},
    {"ingress": {"annotations": {"a": 1}}}, {"podLabels": {"a": {"b": "c"}}}, {"bindAddress": "localhost"}, {"preStopSeconds": -1},
    {"podDisruptionBudget": {"maxUnavailable": 0}}, {"podDisruptionBudget": {"maxUnavailable": "100%%"}},
    {"extraEnv": [{"value": "x"}]}, {"traces": {"endpoint": "collector:4318"}}, {"traces": {"protocol": "http/json"}}, {"traces": {"sampler": "some"}}, {"fullnameOverride": "Upper"}, {"fullnameOverride": "x" * 45}, {"resources": {"limits": {"memroy": "1Gi"}}},
]


def refused(values):
    try:
        CHART_HANDLE.validate_schema(values)
    except helm.HelmError:
        return True
    return False


@check
def bad_values():
    """the schema refuses values that cannot be"""
    accepted = [values for values in BAD if not refused(values)]
    assert not accepted, accepted


def closed_objects(schema, path=()):
    for key, inner in schema.get("properties", {}).items():
        if inner.get("type") == "object" and inner.get("additionalProperties") is False:
            yield path + (key,)
            yield from closed_objects(inner, path + (key,))


@check
def typos():
    """the schema refuses a misspelt key at every level"""
    schema = json.loads((CHART / "values.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    paths = [(), *closed_objects(schema)]
    assert len(paths) > 20
    for path in paths:
        values = {"surprise": 1}
        for key in reversed(path):
            values = {key: values}
        assert refused(values), ".".join(path)

    def open_objects(node, where="#"):
        if isinstance(node, dict):
            if node.get("type") == "object" and "additionalProperties" not in node:
                yield where
            for key, inner in node.items():
                yield from open_objects(inner, f"{where}/{key}")
        elif isinstance(node, list):
            for index, inner in enumerate(node):
                yield from open_objects(inner, f"{where}/{index}")

    assert list(open_objects(schema)) == ["#/definitions/kubernetes"], list(open_objects(schema))


@check
def values_and_schema():
    """values.yaml has every value of the schema and no other, each with a line that says what it is"""
    values = read("helm/adit/values.yaml")
    schema = json.loads((CHART / "values.schema.json").read_text())

    def same(node, schema, path):
        known = schema.get("properties")
        if known is None or schema.get("additionalProperties") is not False:
            return
        assert set(node) == set(known) - {"global"}, f"{path}: {set(node) ^ set(known)}"
        for key, inner in known.items():
            if isinstance(node.get(key), dict):
                same(node[key], inner, f"{path}.{key}")

    same(values, schema, "values")
    passed_on = None  # the indent below which a value is Kubernetes's own, or free
    lines = (CHART / "values.yaml").read_text().splitlines()
    for above, line in zip(lines, lines[1:]):
        found = re.match(r"( *)([\w./-]+):(.*)", line)
        if not found:
            continue
        indent, rest = len(found[1]), found[3].strip()
        if passed_on is not None and indent > passed_on:
            continue
        documented = above.strip().startswith("# -- ")
        assert documented or not rest, f"not documented: {line}"
        passed_on = indent if documented and not rest else None


@check
def defaults_are_the_relays():
    """the values under config are those of config.default.toml"""
    defaults = tomllib.loads((ROOT / "config.default.toml").read_text())
    for key in ("listen", "admin_listen", "database_url", "redis_url", "admin_token"):
        defaults.pop(key)
    assert read("helm/adit/values.yaml")["config"] == defaults


# ---- metrics


def metrics_of_the_source():
    """What /metrics shows: name → its labels and their values. Read from what src/telemetry/metrics.rs registers."""
    files = [(ROOT / f"src/telemetry/{name}.rs").read_text().split("#[cfg(test)]")[0] for name in ("metrics", "registry_meter")]
    source = "".join(files).replace("pub(super) ", "")
    for alias, kind in re.findall(r"^type (\w+) = (Family<\w+, \w+), [^;]*;", source, re.M):
        source = re.sub(rf": {alias},", f": {kind}>,", source)
    enums = {}
    for name, label, body in re.findall(r'(\w+) = "(\w+)" \{(.*?)\n    \}', source, re.S):
        enums[name] = {label: set(re.findall(r'\w+ = "(\w+)"', body))}
    for name, body in re.findall(r"impl EncodeLabelSet for (\w+) \{(.*?)\n\}", source, re.S):
        parts = re.findall(r"(\w+)\.encode\(encoder\)", body)
        enums[name] = {label: values for part in parts for of in enums.values() for label, values in of.items() if label == part}
    types = dict(re.findall(r"^    (\w+): ([\w<>, ]+),$", source, re.M))
    types |= {name: kind for name, kind in re.findall(r"let (\w+) = ([\w<>:, ]+)::default\(\)", source)}
    types |= dict(re.findall(r"[(,]\s*(\w+): (Family<\w+, \w+>)", source))
    aliases = dict(re.findall(r"let (\w+) = (?:self|meter)\.(?:\w+\.)*(\w+)\.clone\(\)", source))
    found = {}
    for name, unit, argument in re.findall(
        r'\.register(?:_with_unit)?\(\s*"(\w+)",\s*"[^"]*",\s*(?:Unit::(\w+),\s*)?([^;]*?),?\s*\);', source
    ):
        if unit:
            name += f"_{unit.lower()}"
        if argument.startswith("Info"):
            found[f"adit_{name}_info"] = {"version": None}
            continue
        field = re.match(r"(?:self\.)?(?:\w+\.)*?(\w+)(?:\.clone\(\))?$", argument)[1]
        kind = types.get(aliases.get(field, field)) or types[field]
        family = re.match(r"Family(?:::)?<(\w+), (\w+)>", kind)
        label = enums[family[1]] if family else {}
        kind = family[2] if family else kind
        suffixes = {"Counter": ["_total"], "Gauge": [""], "Histogram": ["_bucket", "_sum", "_count"]}[kind]
        for suffix in suffixes:
            found[f"adit_{name}{suffix}"] = label | ({"le": None} if suffix == "_bucket" else {})
    return found


try:
    METRICS = metrics_of_the_source()
except (KeyError, TypeError) as error:
    sys.exit(f"tests/chart: src/telemetry/metrics.rs registers a metric in a way that is not understood here: {error!r}: teach metrics_of_the_source")
# What Prometheus and the operator add.
TARGET_LABELS = {"namespace", "job", "instance", "pod", "service"}


def expressions():
    """Every query of dashboards and alerts: where it is, and what it asks."""
    for path in sorted((CHART / "dashboards").glob("*.json")):
        dashboard = json.loads(path.read_text())
        for panel in dashboard["panels"]:
            for target in panel.get("targets", []):
                yield f"{path.name}: {panel['title']}", target["expr"]
        for variable in dashboard["templating"]["list"]:
            if variable["type"] == "query":
                yield f"{path.name}: {variable['name']}", variable["query"]["query"]
    for path in sorted((CHART / "rules").glob("*.yaml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                yield f"{path.name}: {rule['alert']}", rule["expr"]


@check
def metrics_exist():
    """every metric, label and label value of dashboards, alerts and autoscaler is one that the relay shows"""
    assert METRICS["adit_exchanges_in_flight"] == {} and "ok" in METRICS["adit_exchanges_total"]["outcome"]
    asked = set()
    for where, expression in expressions():
        used = re.findall(r"\b(adit_\w+)(?:\{([^}]*)\})?", expression)
        assert used, where
        labels = set()
        for name, selector in used:
            assert name in METRICS, f"{where}: {name} does not exist"
            asked.add(name)
            labels |= set(METRICS[name])
            for label, _, value in re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', selector):
                if label in TARGET_LABELS:
                    continue
                assert label in METRICS[name], f"{where}: {name} has no label {label}"
                if METRICS[name][label] is not None:
                    unknown = set(value.split("|")) - METRICS[name][label]
                    assert not unknown, f"{where}: {label} is never {unknown}"
        for group in re.findall(r"\b(?:by|without) \(([^)]*)\)", expression):
            unknown = {label.strip() for label in group.split(",")} - TARGET_LABELS - labels
            assert not unknown, f"{where}: no label {unknown}"
    unused = {name for name in METRICS if not name.endswith(("_sum", "_count"))} - asked
    if unused:
        print(f"      (shown nowhere: {', '.join(sorted(unused))})")


def adit():
    """A built adit, if there is one: ADIT_BINARY, or what cargo has left here."""
    built = [ROOT / "target/release/adit", ROOT / "target/debug/adit"]
    newest = sorted((path for path in built if path.exists()), key=lambda path: path.stat().st_mtime, reverse=True)
    paths = [os.environ.get("ADIT_BINARY"), *newest]
    found = next((Path(path) for path in paths if path and Path(path).exists()), None)
    if found is None:
        raise Skip("no adit is built here, and ADIT_BINARY is not set")
    return str(found)


def free_port():
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return it.getsockname()[1]


@check
def metrics_of_a_running_relay():
    """a running relay shows exactly the metrics that were read from the source"""
    binary, port = adit(), free_port()
    with tempfile.TemporaryDirectory() as directory:
        arguments = [binary, "serve", "--listen=127.0.0.1:0", f"--admin-listen=127.0.0.1:{port}", f"--database-url=sqlite:{directory}/db"]
        with subprocess.Popen(arguments, cwd=directory, stderr=subprocess.PIPE, text=True) as process:
            try:
                deadline = time.monotonic() + 15
                while True:
                    try:
                        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
                        break
                    except OSError:
                        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
                        time.sleep(0.1)
            finally:
                process.kill()
    shown = {re.match(r"\w+", line)[0] for line in page.splitlines() if line and not line.startswith("#")}
    assert shown == set(METRICS), shown ^ set(METRICS)


@check
def the_relay_takes_its_file():
    """the relay accepts the file of every rendering"""
    binary = adit()
    for name, values in MATRIX.items():
        (mapped,) = [c for c in render(values).kind("ConfigMap") if "relay.toml" in c["data"]]
        if name == "hostile":
            continue  # its log filter is no filter: that it arrives whole is checked above
        with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
            file.write(mapped["data"]["relay.toml"])
            file.flush()
            told = subprocess.run([binary, "serve", "--check", "--config", file.name], capture_output=True, text=True, env={})
        assert told.returncode == 0, f"{name}: {told.stderr}"


@check
def prometheus_takes_the_rules():
    """promtool accepts the alerts, the dashboards' queries and the compose file's configuration"""
    promtool = tool("promtool")
    run(promtool, "check", "rules", "helm/adit/rules/adit.yaml")
    queries = [query.replace("$__rate_interval", "1m") for _, query in expressions() if not query.startswith("label_values")]
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(queries)]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump({"groups": [{"name": "dashboards", "rules": rules}]}, file)
        run(promtool, "check", "rules", file.name)
    run(promtool, "check", "config", "--syntax-only", "deploy/prometheus/prometheus.yml")


# ---- docker-compose, the image, the load balancer


def tool(name):
    found = shutil.which(name)
    if not found:
        raise Skip(f"{name} is not installed")
    return found


def run(*arguments, **environment):
    told = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment)
    assert told.returncode == 0, told.stdout + told.stderr
    return told.stdout


@check
def compose_file():
    """the compose file pins its images, checks health, and keeps what is not public on this machine"""
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    text = (ROOT / "docker-compose.yml").read_text()
    defaults = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", text))
    assert not re.findall(r"(?<!\$)\$\{\w+\}", text), "a variable without a default"
    example = dict(line.split("=", 1) for line in (ROOT / ".env.example").read_text().splitlines() if line and not line.startswith("#"))
    assert example == defaults, set(example.items()) ^ set(defaults.items())
    for name, service in compose["services"].items():
        image = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", service["image"])
        assert re.search(r":v?\d+\.\d+\.\d+", image), f"{name}: {image}"
        # One's own image has a health check; one that does not serve turns it off.
        assert "healthcheck" in service or "build" in service, name
        for port in service.get("ports", []):
            public = port.startswith("${ADIT_PORT")
            assert public or port.startswith("127.0.0.1:"), f"{name}: {port}"
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert not source.startswith(".") or (ROOT / source).exists(), f"{name}: {source}"
    known = "\n".join(path.read_text() for path in (ROOT / "src/cli").glob("*.rs"))
    for name in ("relay", "migrate", "demo-client", "demo-agent"):
        for variable in compose["services"][name]["environment"]:
            assert f'"{variable}"' in known or variable.startswith("OTEL_"), f"{name}: {variable}"
    relay = compose["services"]["relay"]
    assert relay["scale"] == 2
    assert seconds(relay["stop_grace_period"]) > seconds(relay["environment"]["ADIT_DRAIN_TIMEOUT"]) + 6
    values = read("helm/adit/values.yaml")
    assert compose["services"]["mariadb"]["image"] == values["dev"]["mariadbImage"]
    assert compose["services"]["redis"]["image"] == values["dev"]["redisImage"]


@check
def compose_config():
    """docker-compose accepts the compose file, with and without its profile"""
    if shutil.which("docker-compose"):
        compose = ["docker-compose"]
    elif shutil.which("docker") and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        compose = ["docker", "compose"]
    else:
        raise Skip("neither docker-compose nor docker compose is installed")
    plain = yaml.safe_load(run(*compose, "config"))["services"]
    observed = yaml.safe_load(run(*compose, "--profile", "observe", "config"))["services"]
    seen = {"prometheus", "grafana", "otel-collector", "jaeger"}
    assert set(observed) - set(plain) <= seen and seen <= set(observed)


@check
def haproxy_config():
    """haproxy accepts its configuration"""
    run(tool("haproxy"), "-c", "-f", "deploy/haproxy/haproxy.cfg")


@check
def image():
    """the image is pinned, not root, and checks its health with what adit has"""
    text = (ROOT / "deploy/Dockerfile").read_text()
    for base in re.findall(r"^FROM (?:--platform=\S+ )?(\S+)", text, re.M):
        assert base == "scratch" or re.search(r":\d+\.\d+\.\d+-", base), base
    assert re.search(r"^USER \d+:\d+$", text, re.M) and "USER 0" not in text
    user = int(re.search(r"^USER (\d+)", text, re.M)[1])
    assert read("helm/adit/values.yaml")["podSecurityContext"]["runAsUser"] == user
    wanted = re.search(r'^rust-version = "([\d.]+)"', (ROOT / "Cargo.toml").read_text(), re.M)[1]
    assert re.search(rf"rust:{re.escape(wanted)}\.\d+-", text), "the compiler is not that of Cargo.toml"
    version = re.search(r'^version = "([\d.]+)"', (ROOT / "Cargo.toml").read_text(), re.M)[1]
    assert read("helm/adit/Chart.yaml")["appVersion"] == version
    assert f"adit:{version}" in (ROOT / "docker-compose.yml").read_text()
    ignored = (ROOT / ".dockerignore").read_text().split()
    for source in {word for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.M) for word in line.split()}:
        assert f"!{source}" in ignored, f"{source} is not sent to the builder"


@check
def commands():
    """the commands that chart, image and compose file use are commands of adit"""
    source = (ROOT / "src/cli/mod.rs").read_text()
    known = {name.lower() for name in re.findall(r"^    (\w+)\(", source.split("enum Command {")[1].split("}")[0], re.M)}
    assert {"serve", "migrate", "healthcheck", "client", "token", "http", "demo"} <= known, known


def main():
    only = sys.argv[1:]
    passed = failed = 0
    began = time.monotonic()
    for function in checks:
        title = function.__doc__
        if only and not any(word in title for word in only):
            continue
        try:
            function()
        except Skip as why:
            skipped.append(title)
            print(f"SKIP  {title}: NOT RUN, {why}", flush=True)
        except Exception as error:
            failed += 1
            print(f"FAIL  {title}\n      {type(error).__name__}: {error}", flush=True)
            if os.environ.get("TRACE"):
                traceback.print_exc()
        else:
            passed += 1
            print(f"ok    {title}", flush=True)
    print(f"({len(MATRIX)} files of values, {len(RELEASES)} release names, {time.monotonic() - began:.0f} s)")
    print(f"{passed} passed, {failed} failed, {len(skipped)} skipped")
    return 1 if failed or not passed else 0


sys.exit(main())
