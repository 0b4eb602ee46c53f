"""Every family of keras.applications, its smallest member, in towers."""

import gc

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from models import close, placement

import towers

apps = keras.applications
# Family, smallest member, and the smallest images that it takes.
FAMILIES = {
    "convnext": (apps.ConvNeXtTiny, 32),
    "densenet": (apps.DenseNet121, 32),
    "efficientnet": (apps.EfficientNetB0, 32),
    "efficientnet_v2": (apps.EfficientNetV2B0, 32),
    "inception_resnet_v2": (apps.InceptionResNetV2, 75),
    "inception_v3": (apps.InceptionV3, 75),
    "mobilenet": (apps.MobileNet, 32),
    "mobilenet_v2": (apps.MobileNetV2, 32),
    "mobilenet_v3": (apps.MobileNetV3Small, 32),
    "nasnet": (apps.NASNetMobile, 32),
    "resnet": (apps.ResNet50, 32),
    "resnet_v2": (apps.ResNet50V2, 32),
    "vgg16": (apps.VGG16, 32),
    "vgg19": (apps.VGG19, 32),
    "xception": (apps.Xception, 71),
}
# The others are built of the layers of these, and go forward only.
BACKWARD = (
    "convnext",
    "efficientnet",
    "mobilenet",
    "mobilenet_v3",
    "resnet",
    "vgg16",
    "xception",
)
# With noise of their own in training, and with batch norm.
TRAINED = ("convnext", "efficientnet")
SYNCHRONIZED = ("convnext", "efficientnet", "mobilenet_v3")
RATE = (
    0.0  # of dropout, which other rows in a place would have; None: their own
)


class ApplicationsTest(parameterized.TestCase):
    def setUp(self):
        """Without the graph optimizer, which takes a third of the time here."""
        super().setUp()
        options = tf.config.optimizer.get_experimental_options()
        tf.config.optimizer.set_experimental_options(
            {"disable_meta_optimizer": True}
        )
        self.addCleanup(
            tf.config.optimizer.set_experimental_options,
            {"disable_meta_optimizer": False, **options},
        )

    def tearDown(self):
        """Gives back what one model's graphs hold, about 1 GB."""
        super().tearDown()
        keras.utils.clear_session()
        gc.collect()

    def test_every_family_is_here(self):
        modules = {
            name
            for name in dir(apps)
            if hasattr(getattr(apps, name), "preprocess_input")
        }
        self.assertEqual(
            modules - {"resnet50", "imagenet_utils"}, set(FAMILIES)
        )

    def application(self, name):
        """A family's model, and a batch for it."""
        family, size = FAMILIES[name]
        keras.utils.set_random_seed(0)
        model = family(weights=None, input_shape=(size, size, 3), classes=3)
        rng = np.random.default_rng(0)
        x = tf.constant(rng.uniform(0, 255, [3, size, size, 3]), tf.float32)
        return model, x, tf.constant([0, 1, 2])

    @parameterized.named_parameters(zip(FAMILIES, FAMILIES))
    @pytest.mark.rare
    def test_numbers_are_the_plain_model_s(self, name):
        self.check(name)

    def test_numbers_of_one_family_are_the_plain_model_s(self):
        self.check("vgg16")

    def check(self, name):
        model, x, y = self.application(name)
        variables = model.trainable_variables if name in BACKWARD else []

        def gradients(outputs_of):
            """With batch norm by its moving statistics."""

            @tf.function(autograph=False)
            def run(x, y):
                with tf.GradientTape() as tape:
                    outputs = outputs_of(x)
                    loss = keras.losses.sparse_categorical_crossentropy(
                        y, outputs
                    )
                slopes = tape.gradient(loss, variables)
                return outputs, slopes

            return run(x, y)

        expected = gradients(lambda x: model(x, training=False))
        actual = gradients(
            lambda x: (
                towers.build_towers(
                    model, x, placement(2), training=False
                ).outputs
            )
        )
        close(actual[0], expected[0], 1e-4)
        for a, e in zip(actual[1], expected[1], strict=True):
            close(a, e, 1e-4)

    @parameterized.named_parameters(zip(TRAINED, TRAINED))
    @pytest.mark.slow
    @pytest.mark.rare(of=["efficientnet"])
    def test_a_step_trains(self, name):
        model, x, y = self.application(name)
        towered = towers.TowerModel(model, placement(2))
        towered.compile("sgd", "sparse_categorical_crossentropy")
        loss = towered.train_on_batch(x, y)
        self.assertTrue(np.isfinite(loss))
        for weight in towered.get_weights():
            self.assertTrue(np.all(np.isfinite(weight)))

    @parameterized.named_parameters(zip(SYNCHRONIZED, SYNCHRONIZED))
    @pytest.mark.rare
    def test_training_with_the_batch_s_statistics_is_the_plain_model_s(
        self, name
    ):
        """In float64; rounding alone moves some by as much as a step."""
        policy = keras.config.dtype_policy()
        self.addCleanup(keras.config.set_floatx, keras.config.floatx())
        self.addCleanup(keras.config.set_dtype_policy, policy)
        keras.config.set_floatx("float64")
        keras.config.set_dtype_policy("float64")
        rng = np.random.default_rng(0)
        rows, size = 19, FAMILIES[name][1]  # the last batch has three
        x = rng.uniform(0, 255, [rows, size, size, 3])
        y = rng.integers(0, 3, [rows])
        order = [i + rng.permutation(min(8, rows - i)) for i in (0, 8, 16)]

        def trained(order, wrap=lambda model: model):
            model, _, _ = self.application(name)
            for layer in model._flatten_layers():
                if isinstance(layer, keras.layers.Dropout):
                    layer.rate = layer.rate if RATE is None else RATE
            model = wrap(model)
            slow = keras.optimizers.SGD(1e-3, 0.9)
            model.compile(slow, "sparse_categorical_crossentropy")
            model.fit(
                *(x[order], y[order]),
                **{"batch_size": 8, "epochs": 2},
                **{"shuffle": False, "verbose": 0},
            )
            return model.get_weights()

        plain = trained(np.arange(rows))
        other_order = trained(np.concatenate(order))
        towered = trained(
            np.arange(rows),
            lambda model: towers.TowerModel(
                model, placement(2, [2, 1]), synchronized=True
            ),
        )
        far, rounding = (
            max(np.abs(a - p).max() for a, p in zip(weights, plain))
            for weights in (towered, other_order)
        )
        self.assertLess(far, 10 * rounding + 1e-14)
