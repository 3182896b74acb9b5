"""What can go wrong on a broker, on demand.

Cutting connections and ending subscriptions are the broker's own methods; these here are states
that it can be put into.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class ConnectFault(Enum):
    """What goes wrong when a client connects."""

    NONE = "none"
    UNREACHABLE = "unreachable"
    """The broker does not answer."""
    WRONG_PASSWORD = "wrong password"  # noqa: S105  -- the name of a fault
    """The broker refuses the login."""


class PublishFault(Enum):
    """What may happen to a publication."""

    REFUSE = "refuse"
    """It is nacked, and not stored."""
    UNCONFIRMED = "unconfirmed"
    """It is stored, and its confirmation is lost."""
    LOSE = "lose"
    """It is lost on its way: neither stored nor confirmed."""
    BLOCK = "block"
    """It waits until `Broker.unblock` (an alarm), and is stored and confirmed then."""


@dataclass(slots=True)
class _Order:
    fault: PublishFault
    times: int | None
    exchange: str | None
    routing_key: str | None


class Faults:
    """The faults in force; none at first.

    Attributes:
        connect_fault: What goes wrong when a client connects.
    """

    def __init__(self) -> None:
        self.connect_fault = ConnectFault.NONE
        self._orders: list[_Order] = []

    def on_publish(
        self,
        fault: PublishFault,
        *,
        times: int | None = None,
        exchange: str | None = None,
        routing_key: str | None = None,
    ) -> None:
        """Let publications go wrong from now on.

        Args:
            fault: What goes wrong.
            times: How many of them; None: all, until `clear`.
            exchange: Only those to this exchange; None: to any.
            routing_key: Only those with this key; None: with any.
        """
        self._orders.append(_Order(fault, times, exchange, routing_key))

    def clear(self, fault: PublishFault | None = None) -> None:
        """Let publications pass again; those with one fault, or all."""
        self._orders = [each for each in self._orders if fault not in {None, each.fault}]

    def meets(self, exchange: str, routing_key: str) -> PublishFault | None:
        """What happens to this publication; the oldest order that fits counts."""
        for order in self._orders:
            if order.exchange not in {None, exchange} or order.routing_key not in {
                None,
                routing_key,
            }:
                continue
            if order.times is not None:
                order.times -= 1
                if order.times <= 0:
                    self._orders.remove(order)
            return order.fault
        return None
