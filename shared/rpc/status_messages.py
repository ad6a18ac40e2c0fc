"""Between the messages that say how a process is and the type that the services use, both ways."""

from internvl_serving.common.v1 import status_pb2
from shared.service_status import ModelStatus, ServiceStatus, StoreStatus


def status_message(status: ServiceStatus) -> status_pb2.ServiceStatus:
    """Return the message."""
    message = status_pb2.ServiceStatus(
        version=status.version, resident_bytes=status.resident_bytes, available_bytes=status.available_bytes
    )
    message.time.FromNanoseconds(int(status.unix_time_s * 1e9))
    if model := status.model:
        message.model.CopyFrom(
            status_pb2.ModelStatus(
                name=model.name,
                hidden_size=model.hidden_size,
                tokens_per_tile=model.tokens_per_tile,
                data_type=model.data_type,
                devices=model.devices,
            )
        )
    if store := status.store:
        message.store.CopyFrom(store_message(store))
    return message


def store_message(store: StoreStatus) -> status_pb2.StoreStatus:
    """Return the message."""
    return status_pb2.StoreStatus(
        is_reachable=store.is_reachable,
        eviction_policy=store.eviction_policy,
        used_bytes=store.used_bytes,
        max_bytes=store.max_bytes,
    )


def status_of(message: status_pb2.ServiceStatus) -> ServiceStatus:
    """Return what the message says."""
    model, store = message.model, message.store
    return ServiceStatus(
        message.version,
        message.time.ToNanoseconds() / 1e9,
        message.resident_bytes,
        message.available_bytes,
        ModelStatus(model.name, model.hidden_size, model.tokens_per_tile, model.data_type, model.devices)
        if message.HasField("model")
        else None,
        StoreStatus(store.is_reachable, store.eviction_policy, store.used_bytes, store.max_bytes)
        if message.HasField("store")
        else None,
    )
