"""A grouped product in Triton, as one would write it without our kernels: rows of one expert after another.

    out[r, n] = sum over k of x[r, k] * weights[e, n, k]      for offsets[e] <= r < offsets[e + 1]

x is [rows, k] and weights [experts, n, k], both bf16, or both e4m3 with a scale a row. As a pair, weights are
[experts, 2 n, k], gate rows before up rows, and out is silu(gate) * up. Every program has one tile of one
expert's rows and finds it in the offsets, so the host waits for nothing. It uses what the compiler makes of
plain loads and `tl.dot`: no tensor maps, no persistent programs, no split of k.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

# Tiles of rows that share a column of weights before the next column: what they read of x stays in the L2.
ROW_TILES_TOGETHER = 16


class Tile(NamedTuple):
    """What a program multiplies at a time; swapped, weights are the left operand, of at least 64 rows."""

    rows: int
    columns: int
    k_bytes: int
    num_warps: int
    num_stages: int
    swap: bool = False


FEW_ROWS = (
    Tile(16, 64, 256, 4, 4),
    Tile(16, 64, 256, 4, 4, swap=True),
    Tile(16, 32, 512, 4, 3),
    Tile(16, 64, 128, 4, 5),
    Tile(32, 64, 256, 4, 3, swap=True),
    Tile(64, 64, 128, 4, 4),
)
MANY_ROWS_PAIR = (
    Tile(128, 128, 128, 8, 4),
    Tile(128, 128, 128, 8, 3),
    Tile(64, 128, 128, 4, 4),
    Tile(128, 64, 128, 4, 4),
)
MANY_ROWS = (
    Tile(128, 256, 128, 8, 4),
    Tile(128, 256, 128, 8, 3),
    Tile(256, 128, 128, 8, 3),
    Tile(128, 128, 128, 4, 4),
)


@triton.jit
def multiply(x, weights, sums, SWAP: tl.constexpr):
    return tl.dot(weights, tl.trans(x), sums) if SWAP else tl.dot(x, tl.trans(weights), sums)


@triton.jit(do_not_specialize=["group"])
def grouped_product(
    x,
    weights,
    out,
    offsets,
    x_scales,
    weight_scales,
    group,
    EXPERTS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PAIR: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    SWAP: tl.constexpr,
):
    """One tile. Programs run along `group` tiles of rows, then the columns, then the next `group` tiles."""
    program = tl.program_id(0)
    programs_together = group * (N // COLUMNS)
    row_tile = program // programs_together * group + program % group
    column = program % programs_together // group

    expert, first_row, end_row, tiles_before = -1, 0, 0, 0
    start = tl.load(offsets)
    for e in tl.static_range(EXPERTS):
        end = tl.load(offsets + e + 1)
        tiles = tl.cdiv(end - start, ROWS)
        mine = (row_tile >= tiles_before) & (row_tile < tiles_before + tiles)
        expert = tl.where(mine, e, expert)
        first_row = tl.where(mine, start + (row_tile - tiles_before) * ROWS, first_row)
        end_row = tl.where(mine, end, end_row)
        tiles_before += tiles
        start = end
    if expert < 0:
        return

    # Beyond the expert's last row that row is read again, and nothing stored.
    tile_rows = first_row + tl.arange(0, ROWS)
    rows = tl.minimum(tile_rows, end_row - 1)
    n = column * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, STEP)
    weight_rows = 2 * N if PAIR else N
    x_tile = x + rows[:, None] * K + k[None, :]
    weight_tile = weights + expert.to(tl.int64) * weight_rows * K + n[:, None] * K + k[None, :]
    sums = tl.zeros((COLUMNS, ROWS) if SWAP else (ROWS, COLUMNS), dtype=tl.float32)
    up_sums = sums
    for _ in range(0, K, STEP):
        x_values = tl.load(x_tile)
        sums = multiply(x_values, tl.load(weight_tile), sums, SWAP)
        if PAIR:
            up_sums = multiply(x_values, tl.load(weight_tile + N * K), up_sums, SWAP)
        x_tile += STEP
        weight_tile += STEP

    if SWAP:
        sums, up_sums = tl.trans(sums), tl.trans(up_sums)
    if SCALED:
        row_scales = tl.load(x_scales + rows)[:, None]
        scales = weight_scales + expert * weight_rows + n
        sums *= row_scales * tl.load(scales)[None, :]
        if PAIR:
            up_sums *= row_scales * tl.load(scales + N)[None, :]
    if PAIR:
        sums = sums * tl.sigmoid(sums) * up_sums
    out_tile = out + rows[:, None] * N + n[None, :]
    tl.store(out_tile, sums.to(out.dtype.element_ty), mask=(tile_rows < end_row)[:, None])


@triton.jit
def quantize_rows(x, out, scales, N: tl.constexpr, BLOCK: tl.constexpr):
    """A row of bf16 as e4m3, with the scale that brings its largest element to 448."""
    row = tl.program_id(0)
    n = tl.arange(0, BLOCK)
    values = tl.load(x + row * N + n, mask=n < N, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values)), 1e-30) / 448
    tl.store(out + row * N + n, (values / scale).to(tl.float8e4nv), mask=n < N)
    tl.store(scales + row, scale)


class TritonProducts:
    name, formats = "triton", ("bf16", "e4m3")
    # The interpreter would multiply the bits of bf16 as integers.
    half = torch.float16 if triton.knobs.runtime.interpret else torch.bfloat16

    def tiles(self, num_rows, pair):
        """At most six, of which the fastest counts."""
        if num_rows <= 256:
            return FEW_ROWS
        return MANY_ROWS_PAIR if pair else MANY_ROWS

    def product(self, x, weights, offsets, out, pair, tile):
        """x [rows, k] times weights [experts, n or 2 n, k], both scaled or neither, into out [rows, n]."""
        (num_rows, k), (experts, weight_rows, _) = x.values.shape, weights.values.shape
        n = weight_rows // 2 if pair else weight_rows
        step = tile.k_bytes // x.values.element_size()
        assert k % step == 0 and n % tile.columns == 0, f"{tile} does not divide {n} columns of {k}"
        # An expert's last tile may be partial, and no tile is empty.
        row_tiles = min(num_rows, num_rows // tile.rows + experts)
        group = min(ROW_TILES_TOGETHER, row_tiles)
        grid = (triton.cdiv(row_tiles, group) * group * (n // tile.columns),)
        grouped_product[grid](
            *(x.values, weights.values, out, offsets, x.scales, weights.scales, group),
            EXPERTS=experts,
            N=n,
            K=k,
            PAIR=pair,
            SCALED=x.scales is not None,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            STEP=step,
            SWAP=tile.swap,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        return out

    def quantize(self, x):
        """Rows of bf16 as (values, scales) of e4m3."""
        num_rows, n = x.shape
        values = torch.empty(num_rows, n, dtype=torch.float8_e4m3fn, device=x.device)
        scales = torch.empty(num_rows, device=x.device)
        quantize_rows[(num_rows,)](x, values, scales, N=n, BLOCK=triton.next_power_of_2(n), num_warps=8)
        return values, scales
