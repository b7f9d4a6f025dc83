"""Slow twins: what each batched function computes, as loops over plain numbers that a student would write.

Boxes are sequences (x1, y1, x2, y2) of Python floats, so everything here is float64. No function of
detcore is used, and no tensor operation but reading values out and putting results back.
"""

import math

import torch

BACKGROUND, IGNORE = -1, -2
LIMIT = math.log(1000 / 16)


# --- boxes


def area(box):
    x1, y1, x2, y2 = box
    return max(x2 - x1, 0.0) * max(y2 - y1, 0.0)


def intersection(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def iou(a, b):
    shared = intersection(a, b)
    union = area(a) + area(b) - shared
    return shared / union if union > 0 else 0.0


def hull(a, b):
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])


def giou(a, b):
    union = area(a) + area(b) - intersection(a, b)
    around = area(hull(a, b))
    return iou(a, b) - (around - union) / around


def diou(a, b):
    x1, y1, x2, y2 = hull(a, b)
    dx = (a[0] + a[2]) / 2 - (b[0] + b[2]) / 2
    dy = (a[1] + a[3]) / 2 - (b[1] + b[3]) / 2
    return iou(a, b) - (dx**2 + dy**2) / ((x2 - x1) ** 2 + (y2 - y1) ** 2)


def ciou(a, b):
    turn = math.atan((b[2] - b[0]) / (b[3] - b[1])) - math.atan((a[2] - a[0]) / (a[3] - a[1]))
    v = 4 / math.pi**2 * turn**2
    if v == 0:
        return diou(a, b)
    return diou(a, b) - v / (1 - iou(a, b) + v) * v


def elementwise(function, a, b):
    """``function`` of every pair of rows of two (n, 4) tensors."""
    return torch.tensor([function(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)], dtype=torch.float64)


def pairwise_iou(a, b):
    rows = [[iou(x, y) for y in b.tolist()] for x in a.tolist()]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(a), len(b))


# --- coders


def encode_deltas(box, prior, weights=(1, 1, 1, 1)):
    width, height = prior[2] - prior[0], prior[3] - prior[1]
    dx = ((box[0] + box[2]) - (prior[0] + prior[2])) / 2 / width
    dy = ((box[1] + box[3]) - (prior[1] + prior[3])) / 2 / height
    dw = math.log((box[2] - box[0]) / width)
    dh = math.log((box[3] - box[1]) / height)
    return [d * w for d, w in zip((dx, dy, dw, dh), weights, strict=True)]


def decode_deltas(deltas, prior, weights=(1, 1, 1, 1), limit=LIMIT):
    dx, dy, dw, dh = (d / w for d, w in zip(deltas, weights, strict=True))
    width, height = prior[2] - prior[0], prior[3] - prior[1]
    x, y = (prior[0] + prior[2]) / 2 + dx * width, (prior[1] + prior[3]) / 2 + dy * height
    w = width * math.exp(min(max(dw, -limit), limit))
    h = height * math.exp(min(max(dh, -limit), limit))
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


# --- priors


def anchors(strides, maps, *, scales, ratios, base=4.0):
    """Anchors about pixel (x * stride, y * stride); ``maps`` are (height, width) of each level."""
    boxes = []
    for stride, (height, width) in zip(strides, maps, strict=True):
        for y in range(height):
            for x in range(width):
                for ratio in ratios:
                    for scale in scales:
                        side = base * stride * scale
                        w, h = side / math.sqrt(ratio), side * math.sqrt(ratio)
                        boxes.append([x * stride - w / 2, y * stride - h / 2, x * stride + w / 2, y * stride + h / 2])
    return torch.tensor(boxes, dtype=torch.float64)


def inclusive_anchors(strides, maps, *, scales, ratios, base=4.0):
    """MMDetection 0.6: the last pixel belongs to the box, corners are rounded; here x2 + 1 is given."""
    boxes = []
    for stride, (height, width) in zip(strides, maps, strict=True):
        centre = (stride - 1) / 2
        cell = []
        for ratio in ratios:
            for scale in scales:
                w = base * stride * scale / math.sqrt(ratio)
                h = base * stride * scale * math.sqrt(ratio)
                first = round(centre - (w - 1) / 2), round(centre - (h - 1) / 2)
                last = round(centre + (w - 1) / 2), round(centre + (h - 1) / 2)
                cell.append((*first, last[0] + 1, last[1] + 1))
        for y in range(height):
            for x in range(width):
                boxes += [[b[0] + x * stride, b[1] + y * stride, b[2] + x * stride, b[3] + y * stride] for b in cell]
    return torch.tensor(boxes, dtype=torch.float64)


# --- assignment, one image


def max_iou_assign(priors, boxes, labels, *, positive_iou=0.5, negative_iou=0.4, force_match="object", guard=True):
    """MMDetection 2.4's MaxIoUAssigner step by step, plus the guard (without it: its ``min_pos_iou=0``).

    Returns:
        Labels and object index (-1 where there is none) of every prior, as lists.
    """
    overlap = [[iou(prior, box) for box in boxes] for prior in priors]
    owner = [BACKGROUND] * len(priors)
    own_best = [max(range(len(boxes)), key=lambda j, row=row: row[j]) if boxes else -1 for row in overlap]
    # 1. the object a prior overlaps most
    for i, row in enumerate(overlap):
        if boxes and row[own_best[i]] >= positive_iou:
            owner[i] = own_best[i]
        elif boxes and row[own_best[i]] >= negative_iou:
            owner[i] = IGNORE
    # 2. the priors an object overlaps most, object by object: later ones overwrite earlier ones
    for j in range(len(boxes)):
        peak = max((row[j] for row in overlap), default=0.0)
        if force_match == "off" or (guard and peak <= 0):
            continue  # the guard: nobody overlaps this object
        for i, row in enumerate(overlap):
            if row[j] == peak:
                owner[i] = j if force_match == "object" else own_best[i]
    return [labels[o] if o >= 0 else o for o in owner], [max(o, -1) for o in owner]


# --- losses, one element


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def bce(logit, target):
    return -target * log_sigmoid(logit) - (1 - target) * log_sigmoid(-logit)


def focal(logit, target, alpha=0.25, gamma=2.0):
    p = sigmoid(logit)
    positive, negative = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)
    if target:
        return -positive * (1 - p) ** gamma * log_sigmoid(logit)
    return -negative * p**gamma * log_sigmoid(-logit)


def quality_focal(logit, target, beta=2.0):
    return abs(target - sigmoid(logit)) ** beta * bce(logit, target)


def smooth_l1(error, beta=1 / 9):
    return error**2 / (2 * beta) if abs(error) < beta else abs(error) - beta / 2


def quality(logit, target, kind):
    error = sigmoid(logit) - target
    return {
        "bce": lambda: bce(logit, target),
        "l1": lambda: abs(error),
        "smooth_l1": lambda: smooth_l1(error),
        "l2": lambda: error**2 / 2,
        "qfl": lambda: quality_focal(logit, target),
    }[kind]()


# --- terms, over a batch of one or more images


def num_positive(match):
    return max(1, sum(label >= 0 for row in match.labels.tolist() for label in row))


def focal_term(logits, match, alpha=0.25, gamma=2.0):
    total = 0.0
    for row, labels in zip(logits.tolist(), match.labels.tolist(), strict=True):
        for channels, label in zip(row, labels, strict=True):
            if label != IGNORE:
                total += sum(focal(logit, c == label, alpha, gamma) for c, logit in enumerate(channels))
    return total / num_positive(match)


def over_positives(match, element):
    """Sum of ``element(image, prior)`` over the positive priors, divided by their number."""
    total = 0.0
    for b, labels in enumerate(match.labels.tolist()):
        total += sum(element(b, n) for n, label in enumerate(labels) if label >= 0)
    return total / num_positive(match)


def box_delta_term(pred, match, beta=1 / 9):
    priors = pred.priors.boxes.expand_as(match.boxes).tolist()
    deltas, boxes = pred.deltas.tolist(), match.boxes.tolist()

    def element(b, n):
        wanted = encode_deltas(boxes[b][n], priors[b][n])
        return sum(smooth_l1(d - w, beta) for d, w in zip(deltas[b][n], wanted, strict=True))

    return over_positives(match, element)


def box_iou_term(pred, match, measure=giou):
    found, wanted = pred.boxes.tolist(), match.boxes.tolist()
    return over_positives(match, lambda b, n: 1 - measure(found[b][n], wanted[b][n]))


def iou_quality_term(pred, match, kind="bce", negative_weight=0.0):
    found, wanted, logits = pred.boxes.tolist(), match.boxes.tolist(), pred.extras["iou"].tolist()
    mean = over_positives(match, lambda b, n: quality(logits[b][n][0], iou(found[b][n], wanted[b][n]), kind))
    away = 0.0
    for b, labels in enumerate(match.labels.tolist()):
        away += sum(quality(logits[b][n][0], 0.0, kind) for n, label in enumerate(labels) if label == BACKGROUND)
    return mean + negative_weight * away / num_positive(match)


def quality_focal_term(pred, match, beta=2.0):
    found, wanted, logits = pred.boxes.tolist(), match.boxes.tolist(), pred.logits.tolist()
    total = 0.0
    for b, labels in enumerate(match.labels.tolist()):
        for n, label in enumerate(labels):
            if label != IGNORE:
                for c, logit in enumerate(logits[b][n]):
                    target = iou(found[b][n], wanted[b][n]) if c == label else 0.0
                    total += quality_focal(logit, target, beta)
    return total / num_positive(match)


def association(p, reached, kind="pse", beta=1.0, k=1.0):
    gap = abs(p - k * reached)
    return beta * gap**2 if kind == "pse" else -beta * math.log(max(1 - gap, 1e-6))


def association_term(pred, match, kind="pse", beta=1.0, k=1.0, score="label"):
    found, wanted = pred.boxes.tolist(), match.boxes.tolist()
    logits, labels = pred.logits.tolist(), match.labels.tolist()

    def element(b, n):
        logit = logits[b][n][labels[b][n]] if score == "label" else max(logits[b][n])
        return association(sigmoid(logit), iou(found[b][n], wanted[b][n]), kind, beta, k)

    return over_positives(match, element)


# --- selection, one image


def clip(box, height, width):
    x1, y1, x2, y2 = box
    return [min(max(x1, 0.0), width), min(max(y1, 0.0), height), min(max(x2, 0.0), width), min(max(y2, 0.0), height)]


def nms(boxes, scores, threshold):
    """Indices kept, best first."""
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if threshold is None or all(iou(boxes[i], boxes[k]) <= threshold for k in kept):
            kept.append(i)
    return kept


def levels(counts):
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


def candidates_by_prior(ranking, classes, counts, *, score_threshold, threshold_on, candidates):
    pairs = []
    for level in levels(counts):
        for n in sorted(level, key=lambda n: -max(ranking[n]))[:candidates]:
            for c in range(len(ranking[n])):
                if (ranking if threshold_on == "ranking" else classes)[n][c] > score_threshold:
                    pairs.append((n, c))
    return pairs


def candidates_by_pair(ranking, classes, counts, *, score_threshold, threshold_on, candidates):
    pairs = []
    for level in levels(counts):
        cut = ranking if threshold_on == "ranking" else classes
        found = [(n, c) for n in level for c in range(len(ranking[n])) if cut[n][c] > score_threshold]
        pairs += sorted(found, key=lambda pair: -ranking[pair[0]][pair[1]])[:candidates]
    return pairs


def select(
    choose,
    ranking,
    classes,
    boxes,
    size,
    counts,
    *,
    score_threshold=0.05,
    threshold_on="ranking",
    candidates=1000,
    nms_iou=0.5,
    max_detections=100,
):
    """(score, label, prior, box) of every detection of one image, best first.

    Args:
        choose: ``candidates_by_prior`` or ``candidates_by_pair``.
        ranking: (N, C) nested list, as ``classes``.
        classes: class scores.
        boxes: (N, 4) nested list.
        size: (height, width).
        counts: priors a level.
    """
    pairs = choose(
        ranking, classes, counts, score_threshold=score_threshold, threshold_on=threshold_on, candidates=candidates
    )
    found = []
    for label in range(len(ranking[0])):
        own = [n for n, c in pairs if c == label]
        inside = [clip(boxes[n], *size) for n in own]
        scores = [ranking[n][label] for n in own]
        found += [(scores[i], label, own[i], inside[i]) for i in nms(inside, scores, nms_iou)]
    return sorted(found, key=lambda d: (-d[0], d[2], d[1]))[:max_detections]  # the earlier prior, the lower class


# --- FCOS


def points(strides, maps):
    """Squares of side = stride around (x * stride + stride // 2, ...), level by level, row by row."""
    rows = []
    for stride, (height, width) in zip(strides, maps, strict=True):
        for y in range(height):
            for x in range(width):
                cx, cy = x * stride + stride // 2, y * stride + stride // 2
                rows.append([cx - stride / 2, cy - stride / 2, cx + stride / 2, cy + stride / 2])
    return torch.tensor(rows, dtype=torch.float64)


def sides(prior, box):
    """Distances (left, top, right, bottom) from the centre of ``prior`` to the sides of ``box``."""
    x, y = (prior[0] + prior[2]) / 2, (prior[1] + prior[3]) / 2
    return x - box[0], y - box[1], box[2] - x, box[3] - y


def fcos_assign(priors, counts, boxes, labels, *, ranges, radius=None, closed=True):
    """Label and object of each point of one image, -1 where it has none."""
    lows = [-math.inf, *ranges[:-1]]
    found = []
    for n, prior in enumerate(priors):
        level = next(i for i in range(len(counts)) if n < sum(counts[: i + 1]))
        best = -1
        for j, box in enumerate(boxes):
            centre = box
            if radius is not None:
                x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
                reach = radius * (prior[2] - prior[0])
                centre = max(x - reach, box[0]), max(y - reach, box[1]), min(x + reach, box[2]), min(y + reach, box[3])
            far, low, high = max(sides(prior, box)), lows[level], ranges[level]
            suits = low <= far <= high if closed else low < far < high
            if min(sides(prior, centre)) > 0 and suits and (best < 0 or area(box) < area(boxes[best])):
                best = j
        found.append(best)
    return [labels[j] if j >= 0 else BACKGROUND for j in found], found


def centerness(prior, box):
    left, top, right, bottom = sides(prior, box)
    return math.sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom))


def centerness_of(pred, match, b, n):
    return centerness(pred.priors.boxes.expand_as(match.boxes)[b, n].tolist(), match.boxes[b, n].tolist())


def log_iou(a, b, added=0.0):
    shared = intersection(a, b)
    return -math.log((shared + added) / (area(a) + area(b) - shared + added))


def box_loss_term(pred, match, loss=log_iou):
    found, wanted = pred.boxes.tolist(), match.boxes.tolist()
    return over_positives(match, lambda b, n: loss(found[b][n], wanted[b][n]))


def centerness_box_term(pred, match, loss=log_iou):
    found, wanted = pred.boxes.tolist(), match.boxes.tolist()
    above = over_positives(match, lambda b, n: centerness_of(pred, match, b, n) * loss(found[b][n], wanted[b][n]))
    below = over_positives(match, lambda b, n: centerness_of(pred, match, b, n))
    return above / below if below else 0.0


def centerness_term(pred, match):
    logits = pred.extras["centerness"].tolist()
    return over_positives(match, lambda b, n: bce(logits[b][n][0], centerness_of(pred, match, b, n)))


# --- the SSD family


def ssd_assign(priors, boxes, labels, *, positive_iou=0.5, rule="override", guard=True):
    """ssd.pytorch's rule, or Caffe's ``MatchBBox``, step by step, for one image.

    Returns:
        Labels and object index (-1 where there is none) of every prior, as lists.
    """
    overlap = [[iou(prior, box) for box in boxes] for prior in priors]
    owner = [-1] * len(priors)
    if rule == "override":
        for j in range(len(boxes)):  # in order: a later object takes the prior of an earlier one
            best = max(range(len(priors)), key=lambda i, j=j: overlap[i][j])
            if overlap[best][j] > 0 or not guard:
                owner[best] = j
    else:
        waiting = set(range(len(boxes)))
        while waiting:
            free = [(i, j) for i in range(len(priors)) if owner[i] < 0 for j in sorted(waiting)]
            best = max(free, key=lambda pair: overlap[pair[0]][pair[1]], default=None)
            if best is None or overlap[best[0]][best[1]] <= 1e-6:
                break
            owner[best[0]] = best[1]
            waiting.remove(best[1])
    for i, row in enumerate(overlap):
        if owner[i] < 0 and boxes:
            own_best = max(range(len(boxes)), key=lambda j, row=row: row[j])
            owner[i] = own_best if row[own_best] >= positive_iou else -1
    return [labels[o] if o >= 0 else BACKGROUND for o in owner], owner


def hard_negatives(losses, positive, negative, ratio=3.0):
    """Which priors of one image are kept."""
    ranked = sorted((n for n in range(len(losses)) if negative[n]), key=lambda n: -losses[n])
    return set(ranked[: math.floor(ratio * sum(positive))])


def softmax_entropy(channels, label):
    peak = max(channels)
    return peak + math.log(sum(math.exp(x - peak) for x in channels)) - channels[label]


def softmax_mining_term(logits, match, ratio=3.0, weights=None):
    """``weights``: of each object, (image, slot)."""
    total = 0.0
    for b, (rows, labels) in enumerate(zip(logits.tolist(), match.labels.tolist(), strict=True)):
        away = [softmax_entropy(channels, -1) for channels in rows]
        hard = hard_negatives(away, [x >= 0 for x in labels], [x == BACKGROUND for x in labels], ratio)
        for n, label in enumerate(labels):
            if label >= 0:
                share = 1.0 if weights is None else weights[b][int(match.index[b, n])]
                total += share * softmax_entropy(rows[n], label)
            elif n in hard:
                total += away[n]
    return total / num_positive(match)


def scale_weight(m, *, alpha=1.0, beta=3.0, form="scb"):
    if m == 0:
        return 0.0
    shares = {
        "scb": (math.log(m) + alpha) / m,
        "const": 1.0,
        "inv": 1 / m,
        "inv_sqrt": 1 / math.sqrt(m),
        "inv_log": 1 / (math.log(m) + 1),
    }
    return beta * shares[form]


def scale_weights(match, *, normalise=None, **options):
    """Weight of each object, (image, slot)."""
    counts = [[0] * row.shape[0] for row in match.targets.labels]
    for b, labels in enumerate(match.labels.tolist()):
        for n, label in enumerate(labels):
            if label >= 0:
                counts[b][int(match.index[b, n])] += 1
    weights = [[scale_weight(m, **options) for m in row] for row in counts]
    if normalise is None:
        return weights
    every = [w for ms, ws in zip(counts, weights, strict=True) for m, w in zip(ms, ws, strict=True) for _ in range(m)]
    return [[w * len(every) / sum(every) if every else w for w in row] for row in weights]


# --- SCOD


def shrunk(box, beta):
    x, y, w, h = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, (box[2] - box[0]) * beta, (box[3] - box[1]) * beta
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def adaptive_iou(a, b, beta=0.8):
    return iou(shrunk(a, beta), shrunk(b, beta))


def segmentation_labels(maps, size, ranges, boxes, labels, *, closed=False):
    """Label of every cell of one image by block, row by row.

    Args:
        maps: (height, width) in cells of each block.
        size: (height, width) of the image in pixels.
        ranges: (low, high) in square pixels of each block.
        boxes: of the objects.
        labels: of the objects.
        closed: whether an area equal to ``high`` still belongs to the block.
    """
    found = []
    for (rows, columns), (low, high) in zip(maps, ranges, strict=True):
        for i in range(rows):
            for j in range(columns):
                y, x = (i + 0.5) * size[0] / rows, (j + 0.5) * size[1] / columns
                label, smallest = BACKGROUND, math.inf
                for box, own in zip(boxes, labels, strict=True):
                    suits = low < area(box) < high or (closed and area(box) == high)
                    inside = box[0] <= x < box[2] and box[1] <= y < box[3]
                    if suits and inside and area(box) < smallest:
                        label, smallest = own, area(box)
                found.append(label)
    return found


def weak_segmentation_loss(logits, labels, blocks):
    """Sum over blocks of the mean over their cells, mean over the images; background is the last channel."""
    total = 0.0
    for rows, own in zip(logits.tolist(), labels, strict=True):
        losses = [softmax_entropy(channels, label) for channels, label in zip(rows, own, strict=True)]
        start = 0
        for cells in blocks:
            total += sum(losses[start : start + cells]) / cells
            start += cells
    return total / len(labels)
