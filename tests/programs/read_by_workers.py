"""A chief whose workers read for `fit`: run by read_by_workers_test.

As JSON: how far weights and history end from plain `fit` on the joined batches, what
crosses, and what is said and done when a worker is lost.
"""

import json
import warnings

from cluster_workers import Workers, wait_until

WORKERS = Workers(2)

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
from sent_bytes import of_a_step  # noqa: E402

import towers  # noqa: E402

ROWS = [3, 5]  # of each tower's batches
WIDE = 20_000
STEPS = [6, 4]  # of each tower, whose last batch has two rows


def example(i, width):
    """The i-th of a tower's rows, made of numbers only, where it is asked for."""
    i = tf.cast(i, tf.float32)
    x = tf.sin(i * tf.range(1.0, 1.0 + width) / 7.0)
    return x, tf.stack([x[0] * x[1], x[2]]), 0.5 + tf.abs(x[1])


def reads(width, steps=STEPS, parts=3, is_open=False):
    def dataset(tower):
        rows = ROWS[tower.index]
        first = 1000 * tower.index
        data = tf.data.Dataset.range(
            first, first + rows * steps[tower.index] - 1
        )
        data = data.map(lambda i: example(i, width)[:parts])
        data = data.batch(rows)
        return data.filter(lambda *batch: True) if is_open else data

    return towers.per_tower(dataset)


def joined(width, steps=STEPS, parts=3, which=(0, 1)):
    """Plain batches, of what these towers have at a time."""
    read = reads(width, steps, parts).dataset_fn
    each = [list(read(towers.Tower(i, "", "", None))) for i in which]
    batches = []
    for k in range(max(map(len, each))):
        some = [own[k] for own in each if k < len(own)]
        batches.append([np.concatenate(leaves) for leaves in zip(*some)])
    return batches


def dataset(batches):
    spec = tuple(
        tf.TensorSpec([None, *x.shape[1:]], x.dtype) for x in batches[0]
    )
    data = tf.data.Dataset.from_generator(
        lambda: map(tuple, batches), output_signature=spec
    )
    return data.apply(tf.data.experimental.assert_cardinality(len(batches)))


def network(width):
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input([width]),
            keras.layers.Lambda(lambda x: x[:, :4]),
            keras.layers.Dense(8, activation="tanh"),
            keras.layers.Dropout(0.2),
            keras.layers.Dense(2),
        ]
    )


def compiled(model, **kwargs):
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.9),
        "mse",
        metrics=["mae"],
        weighted_metrics=["mse"],
        jit_compile=False,
        **kwargs,
    )
    return model


def far(a, b):
    return float(max(np.abs(np.subtract(x, y)).max() for x, y in zip(a, b)))


def trained(placement, width=4, compile_with=(), **kwargs):
    """How far weights, history and predictions are from plain `fit`."""
    plain = compiled(network(width), **dict(compile_with))
    model = compiled(
        towers.TowerModel(network(width), placement, **kwargs),
        **dict(compile_with),
    )
    results = []
    for one, data, validation, inputs in (
        (
            plain,
            dataset(joined(width)),
            dataset(joined(width, [2, 3], 2)),
            dataset(joined(width, parts=1)),
        ),
        (
            model,
            reads(width),
            reads(width, [2, 3], 2),
            reads(width, parts=1),
        ),
    ):
        history = one.fit(
            data, validation_data=validation, epochs=3, shuffle=False, verbose=0
        ).history
        results.append(
            [
                *one.get_weights(),
                *[history[key] for key in sorted(history)],
                one.evaluate(validation, verbose=0),
                one.predict(inputs, verbose=0),
            ]
        )
    return far(*results)


def to_an_open_end(placement):
    """How far weights end from plain `fit`, which begins a step there."""
    plain = compiled(network(4))
    data = dataset(joined(4)).filter(lambda *batch: True)
    plain.fit(data, epochs=2, verbose=0)
    model = compiled(towers.TowerModel(network(4), placement))
    model.fit(reads(4, is_open=True), epochs=2, verbose=0)
    return far(plain.get_weights(), model.get_weights())


def crossing(placement, **kwargs):
    """Bytes of a step: as reported, for narrow inputs and wide ones; and, of the
    wide ones, as sent by all processes, over those of the inputs."""
    narrow, wide = (
        compiled(towers.TowerModel(network(width), placement, **kwargs))
        for width in (8, WIDE)
    )

    def step(model, width, steps):
        data = reads(width, [40, 40])
        model.fit(data, steps_per_epoch=2, verbose=0)  # traced
        return lambda: model.fit(data, steps_per_epoch=steps, verbose=0)

    reported = [
        towers.execution_report(step(model, width, 1)).total_bytes
        for model, width in ((narrow, 8), (wide, WIDE))
    ]
    sent = of_a_step(step(wide, WIDE, 10), WORKERS.pids.values(), 3)
    return [*reported, sent / (10 * sum(ROWS) * WIDE * 4)]


class Kill(keras.callbacks.Callback):
    """Kills a worker in the first epoch, and starts it again before the third."""

    def __init__(self, cluster):
        super().__init__()
        self.cluster, self.towers, self.batches = cluster, [], []

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            WORKERS.start(1)
            wait_until(lambda: WORKERS.addresses[1] in self.cluster.alive())
        self.batches.append(0)

    def on_train_batch_begin(self, batch, logs=None):
        if len(self.batches) == 1 and batch == 2:
            WORKERS.kill(1)

    def on_train_batch_end(self, batch, logs=None):
        self.batches[-1] += 1

    def on_epoch_end(self, epoch, logs=None):
        self.towers.append(len(self.model.placement.devices))


class KillAtOnce(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        WORKERS.kill(1)

    on_predict_batch_end = on_train_batch_end


def losing(cluster, placement):
    """What comes of a worker that is lost, whose files others do not read."""
    model = compiled(
        towers.TowerModel(network(4), placement, on_lost="continue")
    )
    kill = Kill(cluster)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(reads(4), epochs=4, verbose=0, callbacks=[kill])
    plain = compiled(network(4))
    whole, alone = joined(4), joined(4, which=[0])
    for batches in (whole[:2] + alone[3:], alone, whole, whole):
        plain.fit(dataset(batches), shuffle=False, verbose=0)
    return {
        "towers": kill.towers,
        "batches": kill.batches,
        "weights": far(plain.get_weights(), model.get_weights()),
        "warned": [str(x.message) for x in caught],
    }


def raising(placement):
    """What a lost worker is where nothing is to go on, and in `predict`."""
    results = []
    for on_lost, method in (("raise", "fit"), ("continue", "predict")):
        model = compiled(
            towers.TowerModel(network(4), placement, on_lost=on_lost)
        )
        data = reads(4, [500, 500], 2)
        try:
            getattr(model, method)(data, verbose=0, callbacks=[KillAtOnce()])
            results.append("")
        except towers.WorkerLost as error:
            results.append(str(error))
        WORKERS.start(1)
        cluster = towers.Cluster(WORKERS.addresses, heartbeat=2.0)
        assert len(cluster.alive()) == 2
    return results


def main():
    cluster = towers.Cluster(WORKERS.addresses, heartbeat=2.0)
    placement = towers.Placement.workers(cluster)
    spread = towers.Placement.workers(
        cluster, parameter_device=towers.balanced(placement.devices)
    )
    return {
        "plain": trained(placement),
        "auto": trained(placement, loss_on_towers="auto"),
        "prefetch": trained(placement, prefetch=True),
        "executions": trained(
            placement, compile_with={"steps_per_execution": 4}
        ),
        "balanced": trained(spread),
        "open": to_an_open_end(placement),
        "crossing": crossing(placement),
        "crossing auto": crossing(placement, loss_on_towers="auto"),
        "losing": losing(cluster, placement),
        "raising": raising(placement),
    }


print(json.dumps(main()))
