"""row_tables: tables that towers read by rows, where nothing else reads them."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from executed import Executed
from models import chain, close, make, placement
from same import pair, same_fit

import towers

layers, ops = keras.layers, keras.ops
RNG = np.random.default_rng(0)
WORDS, WIDTH, LENGTH = 50, 6, 5
# 5 rows for 2 towers in batches of 4: the last has one, for the second tower.
X = RNG.integers(1 - WORDS, WORDS, [5, LENGTH]).astype("int32")
X[:, :2] = 3  # again and again
Y = RNG.normal(size=[5, 3]).astype("float32")
TABLE = "/CPU:2"
WHERE = placement(2, layer_devices={"words": TABLE})
CUT = [
    placement(2, layer_devices={"words": by([TABLE, "/CPU:3"])})
    for by in (towers.row_wise, towers.column_wise)
]


def embedding(**kwargs):
    return layers.Embedding(WORDS, WIDTH, name="words", **kwargs)


def sequential(**kwargs):
    return chain(
        [LENGTH],
        embedding(**kwargs),
        layers.GlobalAveragePooling1D(),
        layers.Dense(3),
        dtype="int32",
    )


def masked():
    return sequential(mask_zero=True)


def mixed():
    with_policy = keras.DTypePolicy("mixed_bfloat16")
    return sequential(dtype=with_policy)


def constrained():
    return sequential(embeddings_constraint="unit_norm")


def frozen():
    return sequential(trainable=False)


def regularized():
    return sequential(embeddings_regularizer="l2")


def sparse():
    ids = keras.Input([LENGTH], dtype="int32", sparse=True)
    result = layers.GlobalAveragePooling1D()(embedding()(ids))
    return keras.Model(ids, layers.Dense(3)(result))


def normed():
    """Of towers that meet, if they are asked to."""
    model = sequential()
    norm = layers.BatchNormalization()
    return keras.Sequential([*model.layers[:2], norm, model.layers[2]])


def twice():
    """One table, two lookups, of other dtypes."""
    x, words = keras.Input([LENGTH], dtype="uint8"), embedding()
    both = words(x), words(layers.Lambda(lambda x: ops.cast(x, "int64"))(x))
    pooled = layers.GlobalAveragePooling1D()(layers.Add()(both))
    return keras.Model(x, layers.Dense(3)(pooled))


class Own(keras.Model):
    """Looks up what it has made itself."""

    def __init__(self):
        super().__init__()
        self.words, self.head = embedding(), layers.Dense(3)

    def call(self, x):
        result = self.words(x + 1)
        return self.head(ops.mean(result, 1))


class Tied(Own):
    def call(self, x):
        result = ops.mean(self.words(x), 1)
        logits = ops.matmul(result, ops.transpose(self.words.embeddings))
        return self.head(result) + ops.mean(logits, 1, keepdims=True)


class InLoop(Own):
    """Looks up in a loop, of which TensorFlow's gradient knows no rows."""

    def call(self, x):
        def step(i, total):
            return i + 1, total + self.words(x[:, i])

        zeros = tf.zeros([tf.shape(x)[0], WIDTH])
        _, total = tf.while_loop(lambda i, _: i < LENGTH, step, (0, zeros))
        return self.head(total)


class InFunction(Own):
    def call(self, x):
        return self.head(tf.function(lambda x: ops.mean(self.words(x), 1))(x))


class Differentiates(Own):
    """Its outputs have a gradient by the table in them, of some rows."""

    def call(self, x):
        with tf.GradientTape() as tape:
            y = ops.sum(self.words(tf.range(4)) ** 2)
        slope = tape.gradient(y, self.words.embeddings)
        slope = tf.convert_to_tensor(slope)
        return self.head(ops.mean(self.words(x), 1)) + ops.mean(slope**2)


class Assigns(Own):
    def call(self, x):
        result = self.head(ops.mean(self.words(x), 1))
        table = self.words.embeddings
        table.assign(tf.stop_gradient(table * 1.0))
        return result


def built(kind):
    def model():
        result = kind()
        result(X[:1])
        return result

    model.__name__ = kind.__name__
    return model


def kinds(executed):
    """Ops on the table's device that read variables."""
    results = {n.op for device, _, n in executed.nodes if device == TABLE}
    return results & {"ReadVariableOp", "ResourceGather"}


def compiled(model, optimizer=keras.optimizers.SGD):
    model.compile(optimizer(0.1), "mse")
    return model


def gradients(call, variables):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(call() ** 2)
    return [tf.convert_to_tensor(g) for g in tape.gradient(loss, variables)]


class FitTest(parameterized.TestCase):
    """The numbers are plain, and the table is read as it is to be."""

    def check(
        self,
        factory,
        by_rows,
        optimizer=keras.optimizers.SGD,
        where=WHERE,
        **kwargs,
    ):
        models = pair(factory, where, **kwargs)
        x = X % WORDS if factory is twice else X
        how = {"look": Executed, "optimizer": lambda: optimizer(0.1)}
        if factory is mixed:
            how |= {"tolerance": 1e-2, "histories": 1e-2}
        else:
            how["tolerance"] = 1e-6
        how |= {"batch_size": 4, "epochs": 2}
        read = kinds(same_fit(models, x, Y, **how))
        close(*(m.predict(x, verbose=0) for m in models), 1e-2)
        self.assertEqual("ResourceGather" in read, by_rows)
        if optimizer is keras.optimizers.SGD and factory is not constrained:
            self.assertLen(read, 1)  # or else it is read by both

    @parameterized.parameters(
        masked, built(Own), twice, frozen, mixed, constrained
    )
    @pytest.mark.slow(after=1)
    def test_rows(self, factory):
        self.check(factory, True)

    @parameterized.parameters(
        lambda rate: keras.optimizers.SGD(rate, momentum=0.9),
        lambda rate: keras.optimizers.SGD(rate, global_clipnorm=0.1),
        keras.optimizers.Adagrad,
        keras.optimizers.Adam,
    )
    @pytest.mark.rare
    def test_optimizers(self, optimizer):
        self.check(sequential, True, optimizer)

    @parameterized.product(where=CUT, factory=[masked, built(Tied), mixed])
    @pytest.mark.rare
    def test_pieces(self, factory, where):
        self.check(factory, factory in (masked, mixed), where=where)

    @parameterized.parameters(
        {"quick_start": True},
        {"loss_on_towers": True},
        {"prefetch": True},
        {"synchronized": True, "factory": normed},
    )
    @pytest.mark.rare
    def test_options(self, factory=sequential, **kwargs):
        self.check(factory, True, **kwargs)

    @parameterized.parameters(
        *map(built, (Tied, InLoop, InFunction, Differentiates, Assigns)),
        regularized,
    )
    @pytest.mark.slow(after=1)
    @pytest.mark.rare(after=4)
    def test_what_something_else_reads_is_read_whole(self, factory):
        self.check(factory, False)


class StepTest(parameterized.TestCase):
    """A step of one's own, with a table that is where it is pinned."""

    def setUp(self):
        self.model = make(sequential)
        self.weights = self.model.trainable_variables
        self.expected = gradients(lambda: self.model(X), self.weights)
        towers.place_variables(self.model, WHERE)

    def step(self, asks=False, **kwargs):
        """Gradients, and by what they were read; with those by tower."""

        @tf.function
        def step(x):
            with tf.GradientTape(persistent=True) as tape:
                built = towers.build_towers(self.model, x, WHERE, **kwargs)
                loss = tf.reduce_sum(built.outputs**2)
                own = [tf.reduce_sum(t.outputs**2) for t in built.towers]
                if asks:
                    table = built.towers[1].parameters[0]
                    loss += tf.reduce_sum(table**2)
            gradients = tape.gradient(loss, self.weights)
            if asks:
                each = [
                    tape.gradient(y, t.parameters)
                    for y, t in zip(own, built.towers)
                ]
                gradients = [tf.convert_to_tensor(g) for g in gradients]
                return gradients, each, table
            return [gradients[0].values, gradients[0].indices, *gradients[1:]]

        results = []
        executed = Executed(lambda: results.extend(step(X)))
        return results, kinds(executed)

    def test_it_is_read_by_rows_and_its_gradient_sparse(self):
        (values, indices, *rest), read = self.step()
        table = tf.IndexedSlices(values, indices, [WORDS, WIDTH])
        close([tf.convert_to_tensor(table), *rest], self.expected)
        self.assertEqual(read, {"ResourceGather"})

    def test_who_asks_for_parameters_has_all_of_it(self):
        (result, each, table), read = self.step(asks=True)
        own = self.weights[0].numpy()
        close(table, own)
        close(result, [self.expected[0] + 2 * own, *self.expected[1:]])
        both = [[tf.convert_to_tensor(g) for g in one] for one in each]
        close([a + b for a, b in zip(*both)], self.expected)
        self.assertEqual(read, {"ReadVariableOp", "ResourceGather"})

    @pytest.mark.rare
    def test_a_tower_may_do_without(self):
        def f(model, x, tower):
            if tower.index == 1:
                return model(x)
            return model.layers[-1](tf.zeros([tf.shape(x)[0], WIDTH]))

        def plain():
            zeros = self.model.layers[-1](tf.zeros([2, WIDTH]))
            return tf.concat([zeros, self.model(X[2:])], 0)

        self.expected = gradients(plain, self.weights)
        (values, indices, *rest), read = self.step(tower_fn=f)
        table = tf.IndexedSlices(values, indices, [WORDS, WIDTH])
        close([tf.convert_to_tensor(table), *rest], self.expected)
        self.assertEqual(read, {"ResourceGather"})

    @pytest.mark.rare
    def test_a_tower_that_reads_otherwise_than_was_seen(self):
        calls = []

        def f(model, x):
            calls.append(x)
            table = model.layers[0].embeddings
            more = tf.reduce_sum(table) if len(calls) > 1 else 0.0
            return model(x) + more

        def step():
            return towers.build_towers(self.model, X, WHERE, tower_fn=f).outputs

        def plain():
            return self.model(X) + tf.reduce_sum(self.weights[0])

        close(
            tf.function(lambda: gradients(step, self.weights))(),
            gradients(plain, self.weights),
        )

    @pytest.mark.rare
    def test_sparse_ids_are_looked_up_in_all_of_it(self):
        self.model = make(sparse)
        ids = tf.sparse.from_dense(abs(X))
        towers.place_variables(self.model, WHERE)
        step = tf.function(
            lambda x: towers.build_towers(self.model, x, WHERE).outputs
        )
        read = kinds(Executed(lambda: close(step(ids), self.model(ids))))
        self.assertEqual(read, {"ReadVariableOp"})

    @pytest.mark.rare
    def test_an_id_out_of_range_is_an_error(self):
        with self.assertRaisesRegex(Exception, r"50 is not in \[0, 50\)"):
            towers.build_towers(self.model, X * 0 + WORDS, WHERE)

    @pytest.mark.rare
    def test_gradients_of_gradients_and_in_functions(self):
        def second(call):
            with tf.GradientTape() as tape:
                (slope, *_) = gradients(call, self.weights)
                loss = tf.reduce_sum(slope**2)
            slopes = tape.gradient(loss, self.weights)
            return [tf.convert_to_tensor(g) for g in slopes if g is not None]

        @tf.function
        def outputs(x):
            return towers.build_towers(self.model, x, WHERE).outputs

        close(
            tf.function(lambda: second(lambda: outputs(X)))(),
            second(lambda: self.model(X)),
        )
        close(gradients(lambda: outputs(X), self.weights), self.expected)

    def test_in_a_session(self):
        v1 = tf.compat.v1
        plain, kinds = compiled(make(sequential)), []
        for _ in range(2):
            plain.train_on_batch(X, Y)
        with tf.Graph().as_default():
            graph = towers.build_towers(self.model, X, WHERE, training=True)
            loss = tf.reduce_mean((graph.outputs - Y) ** 2)
            train = v1.train.GradientDescentOptimizer(0.1).minimize(loss)
            config = v1.ConfigProto(device_count={"CPU": 4})
            seen = v1.RunMetadata()
            with v1.Session(config=config) as session:
                session.run(v1.global_variables_initializer())
                options = v1.RunOptions(output_partition_graphs=True)
                session.run(train, options=options, run_metadata=seen)
                session.run(train)
                graph.copy_to_model(session)
            for nodes in seen.partition_graphs:
                kinds += [x.op for x in nodes.node if "CPU:2" in x.device]
        close(self.model.get_weights(), plain.get_weights(), 1e-6)
        self.assertIn("ResourceGather", kinds)
        self.assertNotIn("ReadVariableOp", kinds)


class BytesTest(parameterized.TestCase):
    @parameterized.parameters(50, 5000)
    @pytest.mark.slow(after=1)
    def test_ids_and_rows_cross_however_long_the_table_is(self, words):
        model = chain(
            [LENGTH],
            layers.Embedding(words, WIDTH, name="words"),
            layers.GlobalAveragePooling1D(),
            layers.Dense(3),
            dtype="int32",
        )
        model = compiled(towers.TowerModel(model, WHERE))
        report = towers.execution_report(model.train_on_batch, X[:4], Y[:4])
        rows = X[:4].size * WIDTH * 4
        sent = [t.bytes for t in report.transfers if TABLE in t.target]
        # And how many rows each tower has, and the learning rate.
        self.assertEqual(sum(sent), X[:4].nbytes + rows + 2 * 4 + 4)
        sent = [t.bytes for t in report.transfers if TABLE in t.source]
        self.assertEqual(sum(sent), rows)
        self.assertEqual(report.total_bytes, report.least_bytes)
