"""H.264's levels, and SPS and PPS of what `decoding/kernels/h264.cu` codes: Constrained Baseline, BT.709 limited range.

Source: ITU-T H.264 (08/2021), 7.3.2.1.1, 7.3.2.2, E.1.1; levels by table A-1.
"""

from __future__ import annotations

import functools
import re
from typing import Final

BASELINE: Final = 66
CONSTRAINED: Final = 0xC0  # constraint_set0_flag, constraint_set1_flag
MACROBLOCK: Final = 16  # pixels
# level_idc and its macroblocks: of a picture (MaxFS), a second (MaxMBPS)
LEVELS: Final = (
    (10, 99, 1485), (11, 396, 3000), (12, 396, 6000), (13, 396, 11880), (20, 396, 11880), (21, 792, 19800),
    (22, 1620, 20250), (30, 1620, 40500), (31, 3600, 108000), (32, 5120, 216000), (40, 8192, 245760),
    (42, 8704, 522240), (50, 22080, 589824), (51, 36864, 983040), (52, 36864, 2073600),
)  # fmt: skip
MOST_FPS: Final = 60  # what a level is chosen for


def macroblocks(width: int, height: int) -> tuple[int, int]:
    """Columns and rows of a picture. width, height: pixels."""
    return -(-width // MACROBLOCK), -(-height // MACROBLOCK)


def has_level(width: int, height: int) -> bool:
    """Whether any level allows such pictures. width, height: pixels."""
    return _allows(LEVELS[-1][1], *macroblocks(width, height))


@functools.lru_cache(maxsize=64)
def parameter_sets(width: int, height: int) -> bytes:
    """Both, each behind a start code (Annex B). width, height: of the planes, even, pixels."""
    columns, rows = macroblocks(width, height)
    sps, pps = _Bits(), _Bits()
    for value in (BASELINE, CONSTRAINED, level_for(width, height)):
        sps.put(value, 8)
    # seq_parameter_set_id, log2_max_frame_num_minus4, pic_order_cnt_type (output in the order of decoding),
    # max_num_ref_frames
    sps.put_ue(0, 0, 2, 1)
    sps.put(0, 1)  # gaps_in_frame_num_value_allowed_flag
    sps.put_ue(columns - 1, rows - 1)
    sps.put(0b11, 2)  # frame_mbs_only_flag, direct_8x8_inference_flag
    right, bottom = (columns * MACROBLOCK - width) // 2, (rows * MACROBLOCK - height) // 2
    sps.put(int(right > 0 or bottom > 0), 1)  # frame_cropping_flag
    if right or bottom:
        sps.put_ue(0, right, 0, bottom)
    sps.put(1, 1)  # vui_parameters_present_flag
    sps.put(0b00_1, 3)  # aspect_ratio_info_present_flag, overscan_info_present_flag, video_signal_type_present_flag
    sps.put(0b101_0_1, 5)  # video_format: not said; video_full_range_flag, colour_description_present_flag
    for _ in range(3):  # colour_primaries, transfer_characteristics, matrix_coefficients: BT.709
        sps.put(1, 8)
    sps.put(0b0_0_0_0_0_1, 6)  # no chroma_loc, timing, nal_hrd, vcl_hrd, pic_struct; bitstream_restriction_flag
    sps.put(1, 1)  # motion_vectors_over_pic_boundaries_flag
    # max_bytes_per_pic_denom, max_bits_per_mb_denom, log2_max_mv_length_horizontal and _vertical,
    # max_num_reorder_frames, max_dec_frame_buffering
    sps.put_ue(0, 0, 0, 0, 0, 1)
    pps.put_ue(0, 0)  # pic_parameter_set_id, seq_parameter_set_id
    pps.put(0b00, 2)  # entropy_coding_mode_flag: CAVLC; bottom_field_pic_order_in_frame_present_flag
    pps.put_ue(0, 0, 0)  # num_slice_groups_minus1, num_ref_idx_l0 and _l1_default_active_minus1
    pps.put(0b0_00, 3)  # weighted_pred_flag, weighted_bipred_idc
    pps.put_ue(0, 0, 0)  # pic_init_qp_minus26, pic_init_qs_minus26, chroma_qp_index_offset: 0, which se(v) writes alike
    pps.put(0b0_1_0, 3)  # deblocking_filter_control_present_flag, constrained_intra_pred_flag, redundant_pic_cnt_…
    return b"\0\0\0\1\x67" + sps.rbsp() + b"\0\0\0\1\x68" + pps.rbsp()


def level_for(width: int, height: int) -> int:
    """The least level_idc that allows such pictures, MOST_FPS of them a second; of larger ones the highest."""
    columns, rows = macroblocks(width, height)
    fits = (
        level
        for level, of_picture, of_second in LEVELS
        if _allows(of_picture, columns, rows) and columns * rows * MOST_FPS <= of_second
    )
    return next(fits, LEVELS[-1][0])


def _allows(most: int, columns: int, rows: int) -> bool:  # A.3.1: neither side alone may be too long
    return columns * rows <= most and max(columns, rows) ** 2 <= 8 * most


class _Bits:
    def __init__(self) -> None:
        self._value, self._count = 1, 0  # a leading one keeps leading zeros

    def put(self, value: int, count: int) -> None:
        self._value, self._count = self._value << count | value, self._count + count

    def put_ue(self, *values: int) -> None:
        for value in values:
            self.put(value + 1, 2 * (value + 1).bit_length() - 1)

    def rbsp(self) -> bytes:
        """With its stop bit, and emulation prevention."""
        self.put(1, 1)
        self.put(0, -self._count % 8)
        said = self._value.to_bytes(self._count // 8 + 1, "big")[1:]
        return re.sub(rb"\0\0(?=[\0-\3])", b"\0\0\3", said)
