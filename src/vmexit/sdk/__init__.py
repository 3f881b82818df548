"""HyperDbg's binary interface: its structures and codes, a client that sends them, and what serves them.

The layouts are those of HyperDbg v0.23 on 64-bit (its include/SDK/headers), with its names for fields and codes.
"""

from vmexit.sdk.client import Client, DeviceError, SdkError
from vmexit.sdk.codes import (
    ALL_CORES,
    ALL_EVENTS,
    ALL_MSRS,
    ALL_PROCESSES,
    ActionType,
    CallingStage,
    Error,
    EventType,
    Ioctl,
    ModifyType,
    MsrAction,
    Status,
)
from vmexit.sdk.structures import (
    EventAndActionResult,
    EventOptions,
    GeneralAction,
    GeneralEventDetail,
    ModifyEvents,
    ReadAndWriteOnMsr,
    ShortCircuitingEvent,
    unpack,
)

__all__ = [
    "ALL_CORES",
    "ALL_EVENTS",
    "ALL_MSRS",
    "ALL_PROCESSES",
    "ActionType",
    "CallingStage",
    "Client",
    "DeviceError",
    "Error",
    "EventAndActionResult",
    "EventOptions",
    "EventType",
    "GeneralAction",
    "GeneralEventDetail",
    "Ioctl",
    "ModifyEvents",
    "ModifyType",
    "MsrAction",
    "ReadAndWriteOnMsr",
    "SdkError",
    "ShortCircuitingEvent",
    "Status",
    "unpack",
]
