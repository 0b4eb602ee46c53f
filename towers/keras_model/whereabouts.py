"""whereabouts: what tells each tower where in the batch it is, and its way there."""

import dataclasses
import functools
from collections.abc import Sequence

import tensorflow as tf

from towers.engine.draws import located
from towers.engine.host import host_of
from towers.placement.device_names import same_device
from towers.placement.placement import Placement
from towers.verbs.relays import units_of
from towers.verbs.split import Shards


@dataclasses.dataclass(frozen=True)
class Whereabouts:
    """Tells towers where they are in the batch, for what they draw.

    Attributes:
      shards: the batch.
      placement: says where it is split, and where towers are.
    """

    shards: Shards
    placement: Placement

    @property
    def home(self) -> str:
        """Where it is known how many rows each tower has."""
        return host_of(self.placement.input_device)

    @functools.cached_property
    def hosts(self) -> tuple[str, ...]:
        """Where each tower hears of it."""
        return tuple(map(host_of, self.placement.devices))

    @property
    def travels(self) -> bool:
        """Whether it crosses from `home`, and is not known on the towers."""
        return not self.shards.ranges.are_known and not all(
            same_device(host, self.home) for host in self.hosts
        )

    def sent(self) -> list[tf.Tensor]:
        """For each tower what `draws.located` says, or that of all of its machine."""
        each = self._each()
        for unit in self._shared():
            with tf.device(self.home):
                # Flat: TensorFlow takes rows of a stack before it crosses.
                together = tf.reshape(tf.stack([each[i] for i in unit]), [-1])
            for i in unit:
                each[i] = together
        return each

    def taken(self, sent: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """For each tower what `draws.located` says, of what it was sent."""
        each = list(sent)
        for unit in self._shared():
            size = each[unit[0]].shape[0] // len(unit)
            for k, i in enumerate(unit):
                with tf.device(self.hosts[i]):
                    each[i] = each[i][k * size : (k + 1) * size]
        return each

    def _shared(self) -> list[list[int]]:
        """Towers that are sent one tensor for all of them."""
        units = units_of(self.hosts, self.home) if self.travels else []
        return [unit for unit in units if len(unit) > 1]

    def _each(self) -> list[tf.Tensor]:
        places = self.shards.places()
        with tf.device(self.home):
            total = places[0].all_rows()
        tensors = []
        for place, host in zip(places, self.hosts):
            with tf.device(self.home if self.travels else host):
                tensors.append(located(dataclasses.replace(place, total=total)))
        return tensors
