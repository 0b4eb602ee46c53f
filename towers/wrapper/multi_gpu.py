"""multi_gpu: one tower per GPU, in one line."""

from collections.abc import Sequence
from typing import Any

import keras

from towers.keras_model.checks import check_model
from towers.placement.device_names import check_count
from towers.placement.placement import Placement
from towers.wrapper.tower_model import TowerModel


def to_multi_gpu(
    model: keras.Model,
    n_gpus: int | None = None,
    parameter_device: Any = None,
    merge: Any = "concat",
    loss_on_towers: bool | str = False,
    whole: Sequence[Any] = (),
    prefetch: bool = False,
    synchronized: bool = False,
    gpus: int | None = None,
) -> TowerModel:
    """Wraps a model in one tower per GPU, in one line before `compile()`.

    Looking for GPUs starts TensorFlow: set memory growth before. `batch_size`
    in `fit` is the global one, split over the GPUs. On a machine without GPUs,
    the same towers run on logical CPU devices:

    >>> model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
    >>> try:
    ...     model = towers.to_multi_gpu(model, n_gpus=64)
    ... except ValueError as error:
    ...     model = towers.TowerModel(model, towers.Placement.cpus(2))
    >>> model.compile("sgd", "mse")

    Args:
      model: a Keras 3 model.
      n_gpus: how many GPUs, the first ones that TensorFlow sees.
      parameter_device: where variables and the optimizer live, a device or a
        policy; None is "/CPU:0". What crosses in a training step, with n GPUs
        and P bytes of trainable variables, besides the batch and the outputs:

        - "/CPU:0": each GPU receives P bytes and sends P; the host sends and
          receives nP. No GPU holds variables or the optimizer's slots.
        - "/GPU:0": the first GPU sends and receives (n - 1)P, each other one P,
          and the host nothing. The first holds them all: 3P with Adam.
        - `balanced(["/GPU:0", ...])`: each GPU sends and receives
          2P(n - 1)/n, the bytes of a ring all-reduce (Patarasuk and Yuan,
          "Bandwidth optimal all-reduce algorithms", 2009), and holds 1/n.
      merge: how outputs are gathered, see `gather_outputs`.
      loss_on_towers: whether towers compute losses and metrics themselves, or
        "auto".
      whole: inputs that every tower gets whole, see `TowerModel`.
      prefetch: whether the next batch goes to the GPUs while a step runs, see
        `TowerModel`.
      synchronized: whether batch norms that train take the statistics of the
        whole batch, see `TowerModel`.
      gpus: another name of `n_gpus`, that of Keras's old `multi_gpu_model`.

    Returns:
      A `TowerModel`.

    Raises:
      TypeError: `model` is no Keras model, or `n_gpus` no integer, or given twice.
      ValueError: `n_gpus` is below 1, or there are fewer GPUs.
      RuntimeError: called under a `tf.distribute` strategy.
    """
    check_model(model)
    name, count = ("n_gpus", n_gpus) if gpus is None else ("gpus", gpus)
    if None not in (n_gpus, gpus):
        raise TypeError(
            f"`n_gpus` is {n_gpus!r} and `gpus` {gpus!r}, but both mean the same. "
            "Leave one out."
        )
    check_count(name, count)
    if parameter_device is None:
        parameter_device = "/CPU:0"  # until figures from GPUs say better
    try:
        placement = Placement.gpus(count, parameter_device=parameter_device)
    except ValueError as error:
        message = str(error).replace("`n` asks", f"`{name}` asks")
        raise ValueError(message) from error
    return TowerModel(
        *(model, placement, merge, loss_on_towers, whole),
        prefetch=prefetch,
        synchronized=synchronized,
    )
