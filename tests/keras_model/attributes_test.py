"""attributes: what layers keep of a call is each tower's own."""

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized
from models import close, make, placement
from same import pair, same_fit

import towers

layers = keras.layers
X = np.random.default_rng(0).normal(size=[7, 3]).astype("float32")
WHERE = placement(3, [2, 1, 1])


@keras.saving.register_keras_serializable("attributes_test")
class Centered(layers.Layer):
    """Keeps a tensor, waits for other towers, and looks at it again."""

    needs_all_towers = True

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(2)

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        self.hidden = {"of": [self.dense(x)]}
        mean = towers.all_towers(
            lambda h: tf.reduce_mean(h, 0), self.hidden["of"][0]
        )
        return self.hidden["of"][0] - mean


class First(keras.Model):
    """Keeps what it sees first, as Keras's cells keep their dropout masks."""

    seen = None

    def call(self, x):
        if self.seen is None:
            self.seen = x
        return x - self.seen


class Beside(keras.Model):
    """A step that looks for what a layer has kept."""

    use = staticmethod(lambda kept: kept)

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)
        self.kept = None

    def call(self, x):
        self.kept = tf.reduce_sum(tf.square(x))
        return self.dense(x)

    def train_step(self, data):
        self(data[0])
        return {"kept": self.use(self.kept)}


def sequential(layer):
    return make(lambda: keras.Sequential([keras.Input([3]), layer()]))


class AttributesTest(parameterized.TestCase):
    def test_a_tower_that_waits_finds_what_it_kept(self):
        models = pair(lambda: sequential(Centered), WHERE)
        same_fit(models, X, X[:, :2], batch_size=7)

    def test_a_tower_finds_nothing_of_another(self):
        model = First()
        model(X)  # plain, and builds it
        del model.seen
        graph = towers.build_towers(model, X, WHERE)
        close(graph.outputs, tf.zeros([7, 3]))

    @parameterized.parameters(
        tf.convert_to_tensor,
        keras.ops.mean,
        lambda kept: kept + 1.0,
        lambda kept: 1.0 - kept,
        lambda kept: kept[:1],
        float,
    )
    def test_nobody_takes_one_tower_s_for_the_batch_s(self, use):
        model = make(Beside)
        model(X)
        towered = towers.TowerModel(model, WHERE)
        towered.compile("sgd")
        model.use = use
        for _ in range(2):
            with self.assertRaisesRegex(
                ValueError, "Beside .* in `kept` .* return it"
            ):
                towered.train_on_batch(X, X)
        with self.assertRaisesRegex(AttributeError, "Beside .* in `kept`"):
            print(model.kept.shape)
        model(X)  # without towers it is what it ever was
        self.assertEqual(model.kept.shape, [])
        close(model.kept, tf.reduce_sum(tf.square(X)))
