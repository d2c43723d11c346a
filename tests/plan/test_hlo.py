"""Reading a compiled module: what stands where, how often it runs, how many bytes it sends."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlong.plan import hlo

TEXT = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%cond (state: (s32[], bf16[8,128])) -> pred[] {
  %five = s32[]{:T(128)} constant(5)
  %state = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%n, %five), direction=LT
}

%body (state: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %state = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %go = (bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[8,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %work = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%x), kind=kLoop, calls=%add
  %come = bf16[8,128]{1,0:T(8,128)(2,1)} collective-permute-done(%go)
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%n, %one)
  ROOT %after = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%next, %come)
}

ENTRY %main (x: bf16[8,128]) -> f32[16,128] {
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %two = s32[]{:T(128)} constant(2)
  %begin = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%two, %x)
  %loop = (s32[]{:T(128)}, /*index=1*/bf16[8,128]{1,0:T(8,128)(2,1)}) while(%begin), condition=%cond, body=%body
  %y = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
  %still = bf16[8,128]{1,0:T(8,128)(2,1)} collective-permute(%y), source_target_pairs={{0,1},{1,0}}
  %all = bf16[32,128]{1,0:T(8,128)(2,1)} all-gather(%still), replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
  %part = f32[2,128]{1,0:T(8,128)} reduce-scatter(%all), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add
  ROOT %sum = f32[16,128]{1,0:T(8,128)} all-reduce(%part), replica_groups=[2,4]<=[8], to_apply=%add
}
"""  # noqa: E501


def test_a_small_module():
    said = hlo.read(TEXT)
    tile = 8 * 128 * 2
    assert said.collectives == {
        "collective-permute": hlo.Traffic(sites=2, runs=3 + 1, bytes=4 * tile),
        "all-gather": hlo.Traffic(1, 1, 3 / 4 * 32 * 128 * 2),
        "reduce-scatter": hlo.Traffic(1, 1, 3 * 2 * 128 * 4),
        "all-reduce": hlo.Traffic(1, 1, 2 * 3 / 4 * 16 * 128 * 4),
    }
    assert said.permutes == hlo.Permutes(synchronous=1, asynchronous=1, hidden=1)
    assert said.unread == 0


def test_without_work_in_between_nothing_is_hidden():
    idle = "\n".join(line for line in TEXT.splitlines() if "%work" not in line)
    assert hlo.read(idle).permutes == hlo.Permutes(synchronous=1, asynchronous=1, hidden=0)


def test_a_loop_whose_end_is_computed_counts_once_and_is_told():
    late = TEXT.replace(
        "%five = s32[]{:T(128)} constant(5)", "%five = s32[]{:T(128)} get-tuple-element(%state), index=0"
    )
    said = hlo.read(late)
    assert said.unread == 1
    assert said.collectives["collective-permute"].runs == 2


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2}}", 3),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['a'=4,'b'=2] {'a','b'}", 8),
        ("mesh['a'=8] {'a':(1)4}", 4),
    ],
)
def test_sizes_of_groups(groups, size):
    assert hlo.group_size(f"%x), channel_id=1, replica_groups={groups}, dimensions={{0}}") == size


def test_a_program_of_this_machine():
    """A scan of five sums over all devices: each sends 2 (n - 1)/n of its bytes, five times."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def step(w, x):
        total = jax.shard_map(lambda x: jax.lax.psum(jnp.sin(x), "x"), mesh=mesh, in_specs=P("x"), out_specs=P())(w * x)
        return w + total.sum(), None

    xs = jax.ShapeDtypeStruct((5, 64, 32), jnp.float32, sharding=NamedSharding(mesh, P(None, "x")))
    w = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    compiled = jax.jit(lambda w, xs: jax.lax.scan(step, w, xs)[0]).lower(w, xs).compile()
    found = hlo.read(compiled.as_text()).collectives["all-reduce"]
    assert found.runs >= 5
    assert found.bytes == pytest.approx(5 * 2 * 7 / 8 * 8 * 32 * 4, rel=0.02)
