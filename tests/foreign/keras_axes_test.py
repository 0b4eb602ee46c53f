"""Which axes of their kernels Keras's layers have for outputs, and which for inputs."""

from absl.testing import parameterized
from keras import layers

from towers.foreign.keras_axes import kernel_axes

INPUTS, OUTPUTS = 3, 5


class KerasAxesTest(parameterized.TestCase):
    @parameterized.parameters(
        (layers.Dense(OUTPUTS), 0),
        (layers.Embedding(INPUTS, OUTPUTS), 0),
        (layers.Conv1D(OUTPUTS, 2), 1),
        (layers.Conv2D(OUTPUTS, 2), 2),
        (layers.Conv3D(OUTPUTS, 2), 3),
        (layers.Conv1DTranspose(OUTPUTS, 2), 1),
        (layers.Conv2DTranspose(OUTPUTS, 2), 2),
        (layers.Conv3DTranspose(OUTPUTS, 2), 3),
        (layers.EinsumDense("abc,cd->abd", (4, OUTPUTS)), 1),
        (layers.EinsumDense("...c,dc->...d", (OUTPUTS,)), 1),
        (layers.EinsumDense("abc,bcde->aed", (OUTPUTS, 2)), 1),
    )
    def test_they_have_as_many(self, layer, spatial):
        layer.build([2, *[4] * spatial, INPUTS])
        of_outputs, of_inputs = kernel_axes(layer)
        shape = layer.weights[0].shape
        letters = getattr(layer, "equation", "")
        if letters != "abc,bcde->aed":  # the first of two letters
            self.assertEqual(shape[of_inputs], INPUTS)
            self.assertEqual(shape[of_outputs], OUTPUTS)
        else:
            self.assertEqual((of_outputs, of_inputs), (2, 0))

    @parameterized.parameters(
        layers.LSTM(2),
        layers.DepthwiseConv2D(2),
        layers.LayerNormalization(),
    )
    def test_of_others_it_is_not_said(self, layer):
        self.assertEqual(kernel_axes(layer), (None, None))
