"""The goals and verdicts of the report, on numbers made up for it: `python -m unittest discover -s tools/gpu/bench`."""

import unittest

import tables


def case(name: str, ours: float, rivals: dict[str, float], **facts) -> dict:
    return {"name": name, "ms": {"rarebit": [ours] * 3} | {side: [ms] * 3 for side, ms in rivals.items()}, "board": {}, **facts}


def engine(planned: int, held: int, host_us: float) -> dict:
    return {"planned": planned, "held": held, "host_us": host_us, "load_s": 1.0}


def report(*cases: dict, **changes) -> dict:
    software = {"torch": "", "cuda": "", "cudnn": "", "diffusers": "", "revision": "", "date": "", "seconds": 1.0, "rounds": 3}
    ceilings = {"flops_per_s": 8e14, "bytes_per_s": 4e12, "product": 8192, "copied": 2**31}
    found = {"quick": False, "device": "a GPU", "dtype": "bf16", "ceilings": ceilings, "cases": list(cases), **software} | changes
    return found | {"goals": tables.goals(found)}


FULL = report(
    case("sd15 image 512, 50 DDIM steps, guidance 7.5, batch 1", 250, {"eager": 1000}, kind="image", engine=engine(10**9, 1005 * 10**6, 12.0)),
    case("sd15 image 512, 50 DDIM steps, UNet compiled", 270, {"max-autotune": 300}, kind="image", engine=engine(10**9, 10**9, 12.0)),
    case("sd15 UNet, batch 2", 4, {"eager": 16}, kind="network", flops=16 * 10**11, engine=engine(1, 1, 25.0), errors={"prediction": [0.01, 0.008]}),
    case("sd15 UNet, batch 16", 20, {"eager": 90}, kind="network", flops=128 * 10**11, engine=engine(1, 1, 9.0)),
    case("sd15 UNet and gradient to latents, batch 4", 15, {"eager": 20}, kind="network", flops=10**12, engine=engine(1, 3, 9.0), peer_peak=10),
    case("norm group 2x64x1280", 1, {"channels last": 2}, kind="op", flops=0, bytes=10**6),
    case("norm group 16x4096x320", 0.048, {"channels last": 0.1}, kind="op", flops=0, bytes=16 * 10**7),
    case("attention 2x4096x4096 heads 10x64", 0.4, {"FlashAttention": 0.22, "cuDNN": 0.2}, kind="op", flops=8 * 10**10, bytes=10**6),
    case("gemm 8x8x8 Geglu", 2, {"linear, then activation": 3, "linear alone": 1}, kind="op", flops=1000, bytes=1000),
    {"name": "compiled", "not_run": "the time was up"},
)  # fmt: skip


class Tables(unittest.TestCase):
    def test_goals(self):
        found = [(round(goal["found"], 3), goal["met"]) for goal in FULL["goals"]]
        # The UNet of 16: 640 of 800 TFLOP/s. The norm of 160 MB: 40 of 48 us; that of 1 MB fits a cache and is no matter.
        times = [(0.25, True), (0.9, False), (0.25, True), (0.8, True), (0.75, False), (0.3, True)]
        self.assertEqual(found, [*times, (0.833, True), (0.55, True), (12, True), (25, False), (0.005, True)])

    def test_what_was_not_measured_is_neither_met_nor_missed(self):
        self.assertEqual({goal["met"] for goal in report()["goals"]}, {None})
        self.assertEqual(report(quick=True)["goals"] + report(device="cpu")["goals"], [])

    def test_a_wrong_result_is_told(self):
        self.assertEqual(tables.wrong(FULL), [])
        far = case("x", 1, {"eager": 1}, kind="network", errors={"prediction": [0.02, 0.008]})
        broken = case("y", 1, {"eager": 1}, kind="network", errors={"prediction": [float("nan"), 0.008]})
        self.assertEqual(tables.wrong(report(far, broken)), ["x", "y"])
        exact = case("z", 1, {"eager": 1}, kind="network", errors={"a": [1e-3, 1.0]})
        self.assertEqual(tables.wrong(report(exact, dtype="f32")), ["z"])

    def test_a_rival_does_the_same(self):
        gemm = next(tables.measured(FULL, "gemm"))
        self.assertEqual((tables.best(gemm), tables.ratio(gemm)), ("linear, then activation", 2 / 3))

    def test_the_page_holds_every_case(self):
        page = tables.markdown(FULL)
        self.assertTrue(all(case["name"] in page for case in FULL["cases"]))
        self.assertEqual(page.count("MISSED"), 3)
        self.assertIn("not run, the time was up", page)


if __name__ == "__main__":
    unittest.main()
