"""machines: relays are the devices of towers, and share what they carry."""

from absl.testing import absltest

from towers.placement.machines import Relays

CHIEF = "/CPU:0"
FIRST, SECOND = (
    [f"/job:worker/replica:0/task:{i}/device:GPU:{k}" for k in range(3)]
    for i in range(2)
)


class RelaysTest(absltest.TestCase):
    def test_one_per_machine_that_is_another(self):
        relays = Relays()
        for home, places, expected in (
            (CHIEF, FIRST[:2] + SECOND[:2], FIRST[:1] * 2 + SECOND[:1] * 2),
            (FIRST[2], FIRST[:2] + SECOND[:2], FIRST[:2] + SECOND[1:2] * 2),
            # One that is alone, or this process's own: as they are.
            (CHIEF, [CHIEF, "/CPU:1", SECOND[2]], [CHIEF, "/CPU:1", SECOND[2]]),
            (CHIEF, [SECOND[2]] * 2, [SECOND[2]] * 2),
            (FIRST[0], [CHIEF, "/CPU:1"], [CHIEF] * 2),
        ):
            self.assertEqual(relays.ways(home, places, 10), expected)

    def test_no_device_carries_all(self):
        relays, carried = Relays(), dict.fromkeys(FIRST, 0)
        for size in (9, 5, 5, 4, 4):
            first, *others = relays.ways(CHIEF, FIRST, size)
            self.assertEqual(others, [first] * 2)
            carried[first] += size
        self.assertEqual(list(carried.values()), [9, 9, 9])


if __name__ == "__main__":
    absltest.main()
