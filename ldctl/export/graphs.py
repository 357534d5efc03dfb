"""What stands before and behind the network in an ONNX file, in ONNX's text form."""

from collections.abc import Sequence

from onnx import ModelProto
from onnx.parser import parse_model

# From a photo to the network's input, as the evaluation does it: keep the ratio, round half up to whole pixels;
# bilinear with half-pixel centres and no antialias; normalize; zeros right and below up to a multiple of 32. The zeros
# come last, so that nothing has to be masked.
_RESIZE = """
<ir_version: {ir_version}, opset_import: ["": {opset}]>
resize (uint8[batch, 3, height, width] images)
    => (float[batch, 3, input_height, input_width] resize_input, int64[2] resize_size, int64[2] resize_original)
    <double[1] resize_short = {{{short_side}}}, double[1] resize_long = {{{long_side}}},
     double resize_half = {{0.5}}, double resize_zero = {{0}}, double resize_one = {{1}}, float resize_above = {{0.5}},
     double resize_int16 = {{32768}}, double resize_coarse = {{16384}}, double resize_fine = {{32768}},
     int64 resize_first = {{0}}, int64 resize_second = {{1}}, int64 resize_step = {{32}},
     int64[6] resize_no_margin = {{0, 0, 0, 0, 0, 0}},
     float[1, 3, 1, 1] resize_mean = {{{mean}}}, float[1, 3, 1, 1] resize_std = {{{std}}}>
{{
    resize_original = Shape <start = 2> (images)
    resize_old = Cast <to = 11> (resize_original)
    resize_longest = ReduceMax <keepdims = 1> (resize_old)
    resize_shortest = ReduceMin <keepdims = 1> (resize_old)
    resize_by_long = Div (resize_long, resize_longest)
    resize_by_short = Div (resize_short, resize_shortest)
    resize_scale = Min (resize_by_long, resize_by_short)
    resize_scaled = Mul (resize_old, resize_scale)
    resize_raised = Add (resize_scaled, resize_half)
    resize_whole = Cast <to = 7> (resize_raised)
    resize_size = Max (resize_whole, resize_second)
    resize_new = Cast <to = 11> (resize_size)
    resize_ratio = Div (resize_old, resize_new)
    resize_turned = Transpose <perm = [0, 1, 3, 2]> (images)
    {columns}
    resize_upright = Transpose <perm = [0, 1, 3, 2]> (columns_level)
    {rows}
    resize_level = Cast <to = 1> (rows_level)
    resize_centered = Sub (resize_level, resize_mean)
    resize_normal = Div (resize_centered, resize_std)
    resize_negative = Neg (resize_size)
    resize_margin = Mod (resize_negative, resize_step)
    resize_margins = Concat <axis = 0> (resize_no_margin, resize_margin)
    resize_input = Pad (resize_normal, resize_margins)
}}
"""

# One side of the resize. To the bit what torch does to uint8 on CPUs with AVX2, columns first: two neighbours, weights
# rounded to a 2^14th, or to a 2^15th where none is (nearly) 1, and the result rounded to a whole level. The Resize
# operator differs by a level in some percent of the pixels, for its positions are in single precision; that is nothing
# to a detector, but it would hide real differences from the check. Columns are gathered as rows of the turned image,
# for whole rows are copied at once: ONNX Runtime takes 13 times as long for the same pixels one by one.
_SIDE = """
    {side}_new = Gather <axis = 0> (resize_size, {index})
    {side}_old = Gather <axis = 0> (resize_original, {index})
    {side}_ratio = Gather <axis = 0> (resize_ratio, {index})
    {side}_count = Range (resize_first, {side}_new, resize_second)
    {side}_corner = Cast <to = 11> ({side}_count)
    {side}_center = Add ({side}_corner, resize_half)
    {side}_scaled = Mul ({side}_center, {side}_ratio)
    {side}_shifted = Sub ({side}_scaled, resize_half)
    {side}_at = Max ({side}_shifted, resize_zero)
    {side}_floor = Floor ({side}_at)
    {side}_far = Sub ({side}_at, {side}_floor)
    {side}_near = Sub (resize_one, {side}_far)
    {side}_last = Sub ({side}_old, resize_second)
    {side}_whole = Cast <to = 7> ({side}_floor)
    {side}_low = Min ({side}_whole, {side}_last)
    {side}_next = Add ({side}_low, resize_second)
    {side}_high = Min ({side}_next, {side}_last)
    {side}_is_edge = Equal ({side}_low, {side}_high)
    {side}_larger = Max ({side}_near, {side}_far)
    {side}_weight = Where ({side}_is_edge, resize_one, {side}_larger)
    {side}_most = ReduceMax <keepdims = 0> ({side}_weight)
    {side}_most_scaled = Mul ({side}_most, resize_int16)
    {side}_most_above = Add ({side}_most_scaled, resize_half)
    {side}_most_whole = Floor ({side}_most_above)
    {side}_is_coarse = GreaterOrEqual ({side}_most_whole, resize_int16)
    {side}_unit = Where ({side}_is_coarse, resize_coarse, resize_fine)
    {side}_shape = Constant <value_ints = [1, 1, -1, 1]> ()
    {side}_near_scaled = Mul ({side}_near, {side}_unit)
    {side}_near_above = Add ({side}_near_scaled, resize_half)
    {side}_near_whole = Floor ({side}_near_above)
    {side}_near_share = Div ({side}_near_whole, {side}_unit)
    {side}_near_float = Cast <to = 1> ({side}_near_share)
    {side}_near_weight = Reshape ({side}_near_float, {side}_shape)
    {side}_far_scaled = Mul ({side}_far, {side}_unit)
    {side}_far_above = Add ({side}_far_scaled, resize_half)
    {side}_far_whole = Floor ({side}_far_above)
    {side}_far_share = Div ({side}_far_whole, {side}_unit)
    {side}_far_float = Cast <to = 1> ({side}_far_share)
    {side}_far_weight = Reshape ({side}_far_float, {side}_shape)
    {side}_low_bytes = Gather <axis = 2> ({pixels}, {side}_low)
    {side}_high_bytes = Gather <axis = 2> ({pixels}, {side}_high)
    {side}_low_level = Cast <to = 1> ({side}_low_bytes)
    {side}_high_level = Cast <to = 1> ({side}_high_bytes)
    {side}_low_part = Mul ({side}_low_level, {side}_near_weight)
    {side}_high_part = Mul ({side}_high_level, {side}_far_weight)
    {side}_sum = Add ({side}_low_part, {side}_high_part)
    {side}_above = Add ({side}_sum, resize_above)
    {side}_level = Cast <to = 2> ({side}_above)
"""

# From candidates to final boxes: class-wise NMS, then the best of each image, whatever their class. There may be fewer
# candidates than boxes to return, hence the margin of scores 0.
_SELECT = """
<ir_version: {ir_version}, opset_import: ["": {opset}]>
select (float[batch, rows, 4] select_xyxy, float[batch, classes, rows] select_by_class, float[batch, rows] select_score,
        int64[batch, rows] select_label)
    => (float[batch, {limit}, 4] boxes, float[batch, {limit}] scores, int64[batch, {limit}] labels,
        int64[batch] num_detections)
    <int64[1] select_limit = {{{limit}}}, float[1] select_iou = {{{nms_iou}}}, float[1] select_zero = {{0}},
     int64[2] select_image_row = {{0, 2}}, int64 select_none = {{-1}}, int64[1] select_last = {{-1}},
     int64[4] select_margins = {{0, 0, 0, {limit}}}>
{{
    select_kept = NonMaxSuppression (select_xyxy, select_by_class, select_limit, select_iou, select_zero)
    select_index = Gather <axis = 1> (select_kept, select_image_row)
    select_kept_score = GatherND (select_score, select_index)
    select_shape = Shape (select_score)
    select_empty = ConstantOfShape (select_shape)
    select_final = ScatterND (select_empty, select_index, select_kept_score)
    select_filled = Pad (select_final, select_margins)
    scores, select_place = TopK (select_filled, select_limit)
    select_rows = Shape <start = 1> (select_score)
    select_last_row = Add (select_rows, select_last)
    select_order = Min (select_place, select_last_row)
    select_is_found = Greater (scores, select_zero)
    select_best_label = GatherElements <axis = 1> (select_label, select_order)
    labels = Where (select_is_found, select_best_label, select_none)
    select_count = Cast <to = 7> (select_is_found)
    num_detections = ReduceSum <keepdims = 0> (select_count, select_last)
    select_box_found = Unsqueeze (select_is_found, select_last)
    select_box_order = Unsqueeze (select_order, select_last)
    select_box_shape = Shape (scores)
    select_four = Constant <value_ints = [4]> ()
    select_boxes_shape = Concat <axis = 0> (select_box_shape, select_four)
    select_edge_order = Expand (select_box_order, select_boxes_shape)
    select_best_xyxy = GatherElements <axis = 1> (select_xyxy, select_edge_order)
    boxes = Where (select_box_found, select_best_xyxy, select_zero)
}}
"""


def resize_graph(
    ir_version: int, opset: int, short_side: int, long_side: int, mean: Sequence[float], std: Sequence[float]
) -> ModelProto:
    """Return the graph from `images` to `resize_input`, and their sizes `resize_size` and `resize_original`.

    Args:
        ir_version: Of the file format.
        opset: Of the operators.
        short_side: Pixels to which the shorter side is scaled.
        long_side: Most pixels of the longer side.
        mean: What is subtracted from red, green and blue.
        std: What they are then divided by.
    """
    return parse_model(
        _RESIZE.format(
            ir_version=ir_version,
            opset=opset,
            short_side=float(short_side),
            long_side=float(long_side),
            mean=", ".join(map(repr, mean)),
            std=", ".join(map(repr, std)),
            columns=_SIDE.format(side="columns", index="resize_second", pixels="resize_turned"),
            rows=_SIDE.format(side="rows", index="resize_first", pixels="resize_upright"),
        )
    )


def select_graph(ir_version: int, opset: int, limit: int, nms_iou: float) -> ModelProto:
    """Return the graph from `select_xyxy`, `select_by_class`, `select_score`, `select_label` to the file's outputs.

    Args:
        ir_version: Of the file format.
        opset: Of the operators.
        limit: Most boxes of an image.
        nms_iou: Of two boxes of one class that overlap more than this, the better stays.
    """
    return parse_model(_SELECT.format(ir_version=ir_version, opset=opset, limit=limit, nms_iou=nms_iou))
