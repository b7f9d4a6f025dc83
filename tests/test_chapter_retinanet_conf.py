"""The numbers that the chapter on RetinaNet-Conf states, made by the chapter's own cells."""

import contextlib
import functools
import io
import json
import math
import pathlib

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from detcore.assigners import max_iou_assign
from detcore.coders import DeltaCoder
from detcore.evaluation import CocoEvaluator
from detcore.losses import quality_focal_loss, quality_loss, sigmoid_focal_loss
from detcore.nn import DenseHead
from detcore.scoring import conf_powers, fuse
from detcore.structures import Priors, Targets

ROOT = pathlib.Path(__file__).parents[1]
# what the chapter has imported by the time of these cells
IMPORTS = """
from statistics import mean, stdev
import numpy as np
import torch
from detcore.boxes import pairwise_iou
from detcore.evaluation import best_matches, count_above, pool_detections, pool_targets, suppress, with_true_iou
from detcore.losses import quality_focal_loss, quality_loss, sigmoid_focal_loss
from detcore.scoring import conf_powers, fuse
"""


@functools.cache
def sources():
    cells = json.loads((ROOT / "notebooks/retinanet_conf.ipynb").read_text(encoding="utf-8"))["cells"]
    return {cell["id"]: "".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"}


@functools.cache
def chapter(*names):
    """What the cells of these names define."""
    scope = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for text in (IMPORTS, *(sources()[name] for name in names)):
            exec(text, scope)  # the book's own code
    return scope


@functools.cache
def definitions(*names):
    """Only the functions and imports of cells whose other lines need a trained detector."""
    scope = {}
    exec(IMPORTS, scope)
    for name in names:
        blocks = sources()[name].split("\n\n\n")
        for block in blocks:
            if block.lstrip().startswith(("def ", "from ", "import ")):
                exec(block, scope)
    return scope


def wide(*values):
    return torch.tensor(values, dtype=torch.float64)


@functools.cache
def printed():
    """The paper's tables, as the chapter quotes them."""
    return chapter("table5", "table", "quoted-1", "quoted-2", "quoted-3", "e315")


# --- what the chapter says of the idea


@pytest.mark.parametrize(("w", "total", "share"), [(0.0, 0.0, 0.0), (1e-4, 6.93, 0.09), (1e-3, 69.3, 0.5)])
def test_negatives_outweigh_their_weight(w, total, share):
    theirs, part = chapter("negatives-share")["share_of_negatives"](w)
    assert_close(theirs, total, rtol=0, atol=0.02)
    assert_close(part, share, rtol=0, atol=0.005)


def test_two_pairs_of_curves_become_one():
    cells = chapter("pulls", "pulls-losses")
    same = {name: cells["pull"](loss, t=0.3) for name, loss in cells["quality_losses"](beta=1.0, gamma=0.0).items()}
    assert_close(same["smooth L1"], same["L2"])
    assert_close(same["QFL"], same["CE"])
    apart = {name: cells["pull"](loss, t=0.3) for name, loss in cells["quality_losses"]().items()}
    assert (apart["smooth L1"] - apart["L2"]).abs().max() > 0.01
    assert (apart["QFL"] - apart["CE"]).abs().max() > 0.01


def test_only_the_entropies_are_alive_where_the_sigmoid_is_flat():
    cells = chapter("pulls", "pulls-losses")
    pulls = {name: cells["pull"](f, wide(-6.0), 1.0).abs().item() for name, f in cells["quality_losses"]().items()}
    assert {name for name, pull in pulls.items() if pull > 0.1} == {"QFL", "CE"}


def test_slopes_of_the_table():
    o, t = wide(-2.0, 0.3, 1.5), wide(0.2, 0.9, 0.5)
    q = o.sigmoid()
    slope = {"l1": (q - t).sign() * q * (1 - q), "l2": (q - t) * q * (1 - q), "bce": q - t}
    for kind, want in slope.items():
        x = o.clone().requires_grad_()
        assert_close(torch.autograd.grad(quality_loss(x, t, kind=kind).sum(), x)[0], want)


# --- the diagnosis


def test_printed_drops_belong_to_the_second_image():
    falls = chapter("e37-data", "e37")["falls"]
    assert_close(falls(1)[[0, 1, 5]].tolist(), [11.34, 31.50, 39.84], rtol=0, atol=0.005)
    assert_close([falls(1).mean(), falls(2).mean()], [19.52, 1.09], rtol=0, atol=0.005)


@pytest.mark.parametrize(
    ("size", "priors"), [((608, 608), 69_354), ((640, 640), 76_725), ((640, 768), 92_070), ((384, 1280), 92_070)]
)
def test_printed_prior_counts_are_those_of_pictures_padded_to_640(size, priors):
    assert chapter("e37-data", "e37")["count_priors"](*size) == priors


def crowd(seed=0):
    """Ten squares with a hundred jittered boxes each, and a thousand small boxes anywhere; scores are noisy IoUs."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.cartesian_prod(torch.arange(5.0) * 200 + 50, torch.tensor([150.0, 650.0]))
    objects = torch.cat([corner, corner + 100], dim=1)
    near = objects.repeat_interleave(100, dim=0)
    near = near + 12 * torch.randn(near.shape, generator=generator)
    corner = 970 * torch.rand(1000, 2, generator=generator)
    boxes = torch.cat([near, torch.cat([corner, corner + 30], dim=1)])
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2])
    labels = torch.zeros(len(boxes), dtype=torch.int64)
    scores = 0.06 + 0.9 * torch.rand(len(boxes), generator=generator)
    found = {"boxes": boxes, "labels": labels, "scores": scores, "class_scores": scores}
    return [found], [{"boxes": objects, "labels": labels[:10]}]


def test_share_of_good_boxes_falls_most_under_the_true_iou():
    cells = definitions("after-nms", "e39")
    found, targets = crowd()
    oracle = cells["with_true_iou"](found, targets)
    by_iou = [found[0] | {"scores": oracle[0]["scores"]}]
    reversed_ = [found[0] | {"scores": 1 - oracle[0]["scores"]}]
    fall, lost, (best, left) = cells["after_ranking"](by_iou, targets)
    assert_close(fall, 48.5 - 1.4, rtol=0, atol=0.3)
    assert (lost, left) == (0, best)
    for ranking in (found, reversed_):
        worse, gone, (_, worst) = cells["after_ranking"](ranking, targets)
        assert worse < fall
        assert gone > 0.8
        assert worst < best


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("alpha", [0.25, 0.4])
def test_half_sure_is_one_minus_alpha(alpha, gamma):
    undo = definitions("e310")["undo"]
    assert_close(undo(wide(0.5), alpha=alpha, gamma=gamma).item(), 1 - alpha)


def test_undone_scores_are_where_the_expected_loss_is_least():
    undo = definitions("e310")["undo"]
    logits = torch.linspace(-6, 6, 24001, dtype=torch.float64)
    yes, no = (sigmoid_focal_loss(logits, torch.full(logits.shape, side)) for side in (True, False))
    for share, score in ((0.9, 0.60), (0.95, 0.67), (0.5, 0.40)):
        best = logits[(share * yes + (1 - share) * no).argmin()].sigmoid()
        assert_close(best.item(), score, rtol=0, atol=0.005)
        assert_close(undo(best[None]).item(), share, rtol=0, atol=1e-3)


def test_bending_scores_changes_counts_and_not_precision():
    cells = definitions("e310", "e310-iou")
    found, targets = crowd()
    scores = found[0]["scores"].double() * torch.linspace(0.5, 1, 2000, dtype=torch.float64)
    ious = cells["with_true_iou"](found, targets)[0]["scores"]
    bent = {"as it is": scores, "undone": cells["undo"](scores), "iou": cells["as_iou"](scores, ious)}
    precision = set()
    for value in bent.values():
        evaluator = CocoEvaluator(1, max_detections=2000)
        evaluator.update([found[0] | {"scores": value}], targets)
        precision.add(evaluator.compute()["AP"])
    assert len(precision) == 1
    assert precision.pop() > 0.01
    for cut in (0.3, 0.5, 0.7):
        assert (bent["iou"] > cut).sum() == (ious > cut).sum()
    assert (bent["undone"] > 0.5).sum() != (scores > 0.5).sum()


def test_scores_and_ious_of_every_run_are_positively_correlated():
    seen = 0
    for name in ("iou_aware_scenes.json", "retinanet_conf_scenes.json"):
        if (ROOT / "results" / name).exists():
            for run in json.loads((ROOT / "results" / name).read_text())["runs"]:
                found = run["misalignment"]["correlations"]
                values = [c[k] for n, c in found.items() if n.startswith("scores") for k in ("pearson", "kendall")]
                assert min(values) > 0
                seen += 1
    assert seen > 0


# --- the formulas


def test_equations_2_and_3_hold_and_equation_11_has_the_tighter_ceiling():
    cells = chapter("e31")
    p, q, root = cells["p"], cells["q"], cells["root"]
    assert (root >= p).equal(q >= p)
    assert (root <= p.sqrt()).all()
    assert [round(cells["ceiling"](0.2, alpha), 3) for alpha in (0.5, 0.4)] == [0.447, 0.381]
    u, v = conf_powers(0.4)
    assert (fuse(p, q, class_power=u, quality_power=v) <= p**0.6).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_product_and_root_survive_alike(seed):
    survivors_of = chapter("table5", "table", "quoted-1", "quoted-2", "e32")["survivors_of"]
    (product, ps), (root, rs) = survivors_of(1.0, seed=seed), survivors_of(0.5, seed=seed)
    assert product.equal(root)
    assert 10 < len(product) < 2000
    assert (ps > 0.05).sum() < (rs > 0.05).sum()  # only a fixed threshold notices
    assert not survivors_of(0.5, seed=seed + 10)[0].equal(root)


def test_printed_product_and_printed_one_half_agree():
    assert printed()["TABLE_4"]["cls*obj"][:3] == printed()["TABLE_5"][0.5][1]


def test_printed_focal_loss_drives_negatives_up():
    printed_focal = chapter("e33")["printed_focal"]
    o = torch.logit(wide(0.01, 0.3, 0.9)).requires_grad_()
    assert (torch.autograd.grad(printed_focal(o.sigmoid()).sum(), o)[0] < 0).all()
    for_no = printed_focal(1 - o.sigmoid(), alpha=0.75)  # what is meant for a negative
    assert_close(for_no, sigmoid_focal_loss(o, torch.zeros(3, dtype=torch.bool)))
    assert_close(printed_focal(o.sigmoid()), sigmoid_focal_loss(o, torch.ones(3, dtype=torch.bool)))


def test_equation_7_lacks_a_minus():
    cells = chapter("e34")
    assert_close(cells["slope7"], -cells["printed7"], rtol=1e-6, atol=1e-9)
    assert abs(cells["printed7"]) > 0.01


def test_gradients_at_saturation_at_the_optimum_and_at_the_start():
    pulls_at = chapter("pulls", "pulls-losses", "e35")["pulls_at"]
    far, near, start = pulls_at(-6.0, 1.0), pulls_at(0.0, 0.5001), pulls_at(0.0, 0.7)
    assert_close([far[k] for k in ("L1", "L2", "CE")], [0.00247, 0.00246, 0.998], rtol=0, atol=5e-4)
    assert_close([near["L1"], near["CE"]], [0.25, 0.0001], rtol=0, atol=1e-6)
    assert_close([start[k] for k in ("L1", "CE", "QFL", "L2")], [0.25, 0.20, 0.077, 0.05], rtol=0, atol=5e-4)
    floors = [quality_loss(torch.logit(wide(t)), wide(t)).item() for t in (0.7, 0.8)]
    assert_close(floors, [0.611, 0.500], rtol=0, atol=5e-4)


def test_printed_quality_focal_loss_has_a_maximum_at_the_target():
    printed_qfl = chapter("e36")["printed_qfl"]
    p, y = torch.linspace(0.05, 0.95, 19, dtype=torch.float64), torch.full((19,), 0.5, dtype=torch.float64)
    values = printed_qfl(p, y, 2)
    assert (values <= 0).all()
    assert values.argmax() == 9
    assert_close(-values, quality_focal_loss(torch.logit(p), y), rtol=1e-9, atol=1e-12)  # beta 2: abs is not missed
    assert (-printed_qfl(p, y, 1) < 0).any()
    assert printed_qfl(p, y, 1.5).isnan().any()


# --- the tables


def test_small_objects_of_older_detectors_lost_a_zero():
    cells = chapter("table5", "table", "quoted-1", "quoted-2", "quoted-3", "e312")
    factors = [100 * cells["printed_small"][who] / cells["other_small"][who] for who in cells["printed_small"]]
    assert_close(factors, [10.0] * 3)
    assert min(cells["printed_small"].values()) > max(row[3] for row in printed()["TABLE_6"].values())


def test_the_361_of_the_contribution_list_is_anothers():
    ap = {who: row[0] for (who, trunk), row in printed()["TABLE_6"].items() if trunk == "R50"}
    assert [who for who, value in ap.items() if value == 0.361] == ["IoU-aware"]
    assert ap["Conf"] == 0.360


def test_best_losses_of_table_2():
    names, rows = printed()["NAMES"], printed()["TABLE_2"]
    best = {name: max(rows, key=lambda loss: rows[loss][k]) for k, name in enumerate(names)}
    assert best["AP_L"] == "smooth L1"
    top = {
        name: {loss for loss in rows if rows[loss][k] == max(row[k] for row in rows.values())}
        for k, name in enumerate(names)
    }
    assert {name for name, losses in top.items() if losses == {"CE"}} == {"AP", "AP_M", "AR_M"}
    assert top["AR"] == {"CE", "CE^w, 1e-4"}
    ap = {name: row[0] for name, row in rows.items()}
    assert ap["GFocal"] == ap["L2"] < ap["smooth L1"] == ap["CE^w, 1e-3"]
    assert max(ap[name] for name in ("L1", "smooth L1", "L2", "GFocal")) <= printed()["TABLE_1"]["RetinaNet"][0]


def test_gains_that_follow_from_the_tables():
    points, tables = printed()["points"], printed()
    one, six = tables["TABLE_1"], tables["TABLE_6"]
    assert points(one["Conf"], one["IoU-aware"])["AP"] == 0.2
    assert [points(six["Conf", t], six["IoU-aware", t])["AP"] for t in ("R50", "R101")] == [-0.1, 0.1]
    assert [points(six["Conf", t], six["RetinaNet", t])["AP"] for t in ("R50", "R101")] == [0.7, 1.0]
    trained = points(one["Conf"], one["RetinaNet"])
    assert (trained["AP_S"], trained["AR_S"]) == (-0.8, -1.6)
    assert math.isclose((trained["AP_M"] + trained["AP_L"]) / 2, 0.65)
    assert math.isclose((trained["AR_M"] + trained["AR_L"]) / 2, 1.1)  # what the text says of AP
    fused = [
        points(tables["TABLE_3"][a], tables["TABLE_2"][b])["AP"]
        for a, b in zip(("CE, product .4", "CE^w 1e-4, product .4"), ("CE", "CE^w, 1e-4"), strict=True)
    ]
    assert fused == [0.3, 0.4]


def test_peaks_of_table_5_lie_further_to_the_quality_for_iou_aware():
    rows = printed()["TABLE_5"]
    for k in (0, 1, 2):
        peaks = [max(a for a in rows if rows[a][who][k] == max(r[who][k] for r in rows.values())) for who in (0, 1)]
        assert peaks[0] > peaks[1]
    flat = [rows[a][1][0] for a in (0.2, 0.3, 0.4, 0.5)]
    assert math.isclose(max(flat) - min(flat), 0.001, abs_tol=1e-9)


# --- the released code


def test_released_fusion_leaves_small_levels_bare():
    released = chapter("partial-fusion")["released"]
    assert [round(released(0.3, 0.6, n), 3) for n in (1001, 1000)] == [0.396, 0.486]
    sides = {
        size: [9 * -(-size[0] // 2**k) * -(-size[1] // 2**k) for k in range(3, 8)] for size in ((608, 1024), (320, 320))
    }
    assert [n for n in sides[608, 1024] if n <= 1000] == [360]
    assert [n for n in sides[320, 320] if n <= 1000] == [900, 225, 81]


def test_head_refuses_pairs_of_maps():
    head = DenseHead(4, 1, 1, DeltaCoder())
    maps = torch.zeros(1, 4, 2, 2)
    with pytest.raises(TypeError):
        head.class_tower((maps, maps))
    assert head([maps], Priors(torch.rand(1, 4, 4), (4,))).logits.shape == (1, 4, 1)


def test_unguarded_rule_gives_all_free_priors_to_an_object_out_of_reach():
    unguarded = definitions("assigner")["unguarded"]
    overlap = torch.tensor([[0.6, 0.0], [0.2, 0.0], [0.0, 0.0], [0.45, 0.0]])
    assert unguarded(overlap).tolist() == [1, 1, 1, 1]
    reachable = torch.tensor([[0.6, 0.0], [0.2, 0.1], [0.0, 0.0], [0.45, 0.0]])
    assert unguarded(reachable).tolist() == [0, 1, -1, -1]


def test_two_rules_for_a_forced_match():
    # the prior overlaps the first object by .9; it is all that the second one has, by 1/3
    prior = torch.tensor([[[0.0, 0.0, 10.0, 10.0]]])
    two = torch.tensor([[[0.0, 0.0, 10.0, 9.0], [0.0, 0.0, 10.0, 30.0]]])
    objects = Targets(two, torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool))
    owner = {rule: max_iou_assign(Priors(prior, (1,)), objects, force_match=rule) for rule in ("object", "prior")}
    assert {rule: match.labels.item() for rule, match in owner.items()} == {"object": 1, "prior": 0}


def test_verdict_needs_seeds_and_two_standard_deviations():
    verdict = chapter("verdict")["verdict"]
    assert "too few" in verdict([0.3, 0.3])[1]
    assert verdict([0.30, 0.20, 0.40])[1] == "**holds**"
    assert verdict([-0.30, -0.20, -0.40])[1] == "**does not hold**"
    assert "not distinguishable" in verdict([0.30, 0.10, 0.50])[1]


def test_ceiling_of_the_exercise():
    alpha = 1 - math.log(0.4) / math.log(0.3)
    assert_close(chapter("e31")["ceiling"](0.3, alpha), 0.4, rtol=0, atol=1e-6)
    assert round(alpha, 3) == 0.239
    assert np.isclose(1 - alpha, 0.761, atol=5e-4)
