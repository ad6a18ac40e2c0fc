"""Schemas of the custom resources that the manifests use: their required fields, and no others than are known."""

from typing import Any


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "required": sorted(required),
        "properties": required | (optional or {}),
        "additionalProperties": False,
    }


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


def _map(values: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": values}


_TEXT, _NUMBER = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}
_PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
_DURATION = {"type": "string", "pattern": r"^(\d+(ms|s|m|h))+$"}
_ROUTE = {"parentRefs": _list(_object({"name": _TEXT})), "hostnames": _list(_TEXT)}
_BACKENDS = _list(_object({"name": _TEXT, "port": _PORT}))
_TRIGGER = _object(
    {
        "type": {"const": "prometheus"},
        "metricType": {"enum": ["AverageValue", "Value"]},
        "metadata": _object({"serverAddress": _TEXT, "query": _TEXT, "threshold": _TEXT}),
    }
)
_SCALING = _object(
    {"stabilizationWindowSeconds": {"type": "integer", "minimum": 0, "maximum": 3600}},
    {
        "policies": _list(
            _object({"type": {"enum": ["Pods", "Percent"]}, "value": _PORT, "periodSeconds": {"maximum": 1800}})
        )
    },
)
_BEHAVIOR = _object(
    {"horizontalPodAutoscalerConfig": _object({"behavior": _object({}, {"scaleUp": _SCALING, "scaleDown": _SCALING})})}
)
_SPECS = {
    ("keda.sh/v1alpha1", "ScaledObject"): _object(
        {
            "scaleTargetRef": _object({"apiVersion": _TEXT, "kind": _TEXT, "name": _TEXT}),
            "triggers": _list(_TRIGGER),
        },
        {"minReplicaCount": _NUMBER, "maxReplicaCount": _NUMBER, "pollingInterval": _NUMBER, "advanced": _BEHAVIOR},
    ),
    ("gateway.networking.k8s.io/v1", "Gateway"): _object(
        {
            "gatewayClassName": _TEXT,
            "listeners": _list(
                _object(
                    {"name": _TEXT, "port": _PORT, "protocol": {"enum": ["HTTP", "HTTPS", "TLS"]}},
                    {
                        "hostname": _TEXT,
                        "tls": _object(
                            {"mode": {"const": "Terminate"}, "certificateRefs": _list(_object({"name": _TEXT}))}
                        ),
                        "allowedRoutes": _object({"namespaces": _object({"from": {"enum": ["Same", "All"]}})}),
                    },
                )
            ),
        }
    ),
    ("gateway.networking.k8s.io/v1", "GRPCRoute"): _object(
        _ROUTE
        | {
            "rules": _list(
                _object(
                    {"backendRefs": _BACKENDS},
                    {"matches": _list(_object({"method": _object({"service": _TEXT}, {"method": _TEXT})}))},
                )
            )
        }
    ),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): _object(
        _ROUTE
        | {
            "rules": _list(
                _object(
                    {"backendRefs": _BACKENDS},
                    {
                        "matches": _list(_object({"path": _object({"type": {"const": "PathPrefix"}, "value": _TEXT})})),
                        "timeouts": _object({}, {"request": _DURATION, "backendRequest": _DURATION}),
                    },
                )
            )
        }
    ),
    ("monitoring.coreos.com/v1", "PodMonitor"): _object(
        {
            "selector": _object({"matchLabels": _map(_TEXT)}),
            "podMetricsEndpoints": _list(_object({"port": _TEXT}, {"interval": _DURATION})),
        }
    ),
    ("monitoring.coreos.com/v1", "PrometheusRule"): _object(
        {
            "groups": _list(
                _object(
                    {
                        "name": _TEXT,
                        "rules": _list(
                            _object(
                                {"alert": _TEXT, "expr": _TEXT, "for": _DURATION},
                                {"labels": _map(_TEXT), "annotations": _map(_TEXT)},
                            )
                        ),
                    }
                )
            )
        }
    ),
}
_METADATA = _object({"name": _TEXT}, {"namespace": _TEXT, "labels": _map(_TEXT), "annotations": _map(_TEXT)})


def schema_of(api_version: str, kind: str) -> dict[str, Any] | None:
    """Return the schema of a custom resource, or None where Kubernetes has its own."""
    spec = _SPECS.get((api_version, kind))
    if spec is None:
        return None
    return _object({"apiVersion": {"const": api_version}, "kind": {"const": kind}, "metadata": _METADATA, "spec": spec})
