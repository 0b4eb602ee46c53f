"""folding: blocks of steps that come again are found, and no others."""

from absl.testing import parameterized

from towers.planning.folding import Block, repeated


def chain(n):
    return {(i, i + 1) for i in range(n - 1)}


class FoldingTest(parameterized.TestCase):
    @parameterized.parameters(
        ("abc", set(), []),
        ("xabababy", set(), [Block(1, 2, 3)]),
        ("aaaab", set(), [Block(0, 1, 4)]),
        ("aab", set(), []),  # which saves little
        # A residual in each.
        ("xabcabcabcy", {(0, 3), (3, 6), (6, 9)}, [Block(1, 3, 3)]),
        # One in the last only, which is not drawn as the others then.
        ("xabcabcabcy", {(6, 9)}, [Block(1, 3, 2)]),
        # A step behind takes what one of the first gives, as in a U-Net.
        ("xabababy", {(2, 7)}, []),
        # And what the last gives may go anywhere.
        ("xabababyz", {(6, 8)}, [Block(1, 2, 3)]),
        ("ababab" + "cdcdcd", set(), [Block(0, 2, 3), Block(6, 2, 3)]),
    )
    def test_of_a_chain(self, kinds, more, expected):
        result = repeated(kinds, chain(len(kinds)) | more)
        self.assertEqual(result, expected)
