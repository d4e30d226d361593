"""What a GPU launches, read from texts of programs that are written here."""

import pytest

from compiled import kernels
from compiled.kernels import Kernel


def entry(*lines, before=""):
    body = "\n".join(f"  {line}" for line in lines)
    head = "HloModule jit_step, is_scheduled=true"
    return f"{head}\n\n{before}\nENTRY %main.2 (a: f32[4]) -> f32[4] {{\n{body}\n}}\n"


@pytest.mark.parametrize(
    ("shape", "nbytes"),
    [
        ("f32[3,3,64]{2,1,0}", 4 * 9 * 64),
        ("f32[]", 4),
        ("f32[0]{0}", 0),
        ("bf16[8]{0:S(5)}", 16),
        ("pred[7]{0}", 7),
        ("s32[2]", 8),
        ("u8[5]", 5),
        ("f8e4m3fn[6]{0}", 6),
        ("s4[3]{0:E(4)}", 2),
        ("c64[2]", 16),
        ("token[]", 0),
        ("(f32[2]{0}, (s32[], pred[3]{0}), /*index=2*/bf16[4,2]{1,0})", 8 + 4 + 3 + 16),
        ("()", 0),
    ],
)
def test_sizes(shape, nbytes):
    assert kernels.size(shape) == nbytes


def test_a_fusion_counts_once_with_its_operands_and_results():
    text = entry(
        "%a.1 = f32[4]{0} parameter(0), sharding={replicated}, metadata={op_name=\"x['a'](0)\"}",
        "%b = bf16[4]{0} parameter(1)",
        "%c = s32[] constant(3)",
        "%both = (f32[4]{0}, pred[4]{0}) fusion(%a.1, %b, /*index=2*/%c), kind=kLoop, calls=%add",
        "%one = pred[4]{0} get-tuple-element(%both), index=1",
        "%shaped = pred[2,2]{1,0} bitcast(%one)",
        "ROOT %t = (pred[2,2]{1,0}) tuple(%shaped)",
        before="%add (p: f32[4]) -> f32[4] {\n"
        "  %p = f32[4]{0} parameter(0)\n"
        "  ROOT %s = f32[4]{0} add(%p, %p)\n"
        "}\n",
    )
    assert kernels.launches(text) == [Kernel("fusion", 16 + 8 + 4 + 16 + 4, 1)]


def test_an_operand_named_twice_is_read_once():
    text = entry("%a = f32[4]{0} parameter(0)", "ROOT %m = f32[4]{0} multiply(%a, %a)")
    assert kernels.launches(text) == [Kernel("multiply", 32, 1)]


def test_calls_are_followed():
    """As those of a command buffer, which may hold another."""
    inner = (
        "%inner (q: f32[4]) -> f32[4] {\n"
        "  %q = f32[4]{0} parameter(0)\n"
        "  ROOT %n = f32[4]{0} copy(%q)\n"
        "}\n"
        "%command_buffer (p: f32[4]) -> f32[4] {\n"
        "  %p = f32[4]{0} parameter(0)\n"
        '  %m = f32[4]{0} custom-call(%p), custom_call_target="__cublas$gemm"\n'
        "  ROOT %c = f32[4]{0} call(%m), to_apply=%inner\n"
        "}\n"
    )
    text = entry(
        "%a = f32[4]{0} parameter(0)",
        "ROOT %r = f32[4]{0} call(%a), to_apply=%command_buffer",
        before=inner,
    )
    assert kernels.launches(text) == [
        Kernel("custom-call", 32, 1),
        Kernel("copy", 32, 1),
    ]


LOOP = (
    "%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {\n"
    "  %s = (s32[], f32[4]{0}) parameter(0)\n"
    "  %i = s32[] get-tuple-element(%s), index=0\n"
    "  %x = f32[4]{0} get-tuple-element(%s), index=1\n"
    "  %y = f32[4]{0} fusion(%x, %i), kind=kLoop, calls=%f\n"
    "  %j = s32[] fusion(%i), kind=kLoop, calls=%g\n"
    "  ROOT %t = (s32[], f32[4]{0}) tuple(%j, %y)\n"
    "}\n"
    "%condition (s: (s32[], f32[4])) -> pred[] {\n"
    "  %s.1 = (s32[], f32[4]{0}) parameter(0)\n"
    "  %i.1 = s32[] get-tuple-element(%s.1), index=0\n"
    "  ROOT %less = pred[] fusion(%i.1), kind=kLoop, calls=%h\n"
    "}\n"
)


def of_loop(attributes=""):
    return entry(
        "%a = (s32[], f32[4]{0}) parameter(0)",
        "%c = (s32[], f32[4]{0}) copy(%a)",
        "ROOT %w = (s32[], f32[4]{0}) while(%c), condition=%condition, body=%body" + attributes,
        before=LOOP,
    )


def test_the_body_of_a_loop_counts_in_each_round():
    known = ', backend_config={"known_trip_count":{"n":"20"}}'
    before, step, counter = kernels.launches(of_loop(known))
    assert before == Kernel("copy", 40, 1)
    assert (step, counter) == (Kernel("fusion", 36, 20), Kernel("fusion", 8, 20))
    assert kernels.count([before, step, counter]) == {"fusion": 40, "copy": 1}
    assert kernels.moved([before, step, counter]) == 40 + 20 * 36 + 20 * 8


def test_the_condition_of_a_loop_counts_where_its_rounds_are_unknown():
    launched = kernels.launches(of_loop())
    assert [kernel.nbytes for kernel in launched] == [40, 5, 36, 8]
    assert {kernel.times for kernel in launched} == {1}


@pytest.mark.parametrize(
    "named",
    ["branch_computations={%few, %many}", "true_computation=%many, false_computation=%few"],
)
def test_the_longest_branch_of_a_conditional_counts(named):
    branches = (
        "%few (p: f32[4]) -> f32[4] {\n"
        "  %p = f32[4]{0} parameter(0)\n"
        "  ROOT %k = f32[4]{0} copy(%p)\n"
        "}\n"
        "%many (q: f32[4]) -> f32[4] {\n"
        "  %q = f32[4]{0} parameter(0)\n"
        "  %m = f32[4]{0} dot(%q, %q)\n"
        "  ROOT %n = f32[4]{0} scatter(%m), to_apply=%few\n"
        "}\n"
    )
    text = entry(
        "%a = f32[4]{0} parameter(0)",
        "%i = s32[] parameter(1)",
        f"ROOT %c = f32[4]{{0}} conditional(%i, %a, %a), {named}",
        before=branches,
    )
    assert [kernel.kind for kernel in kernels.launches(text)] == ["dot", "scatter"]


def test_collectives_count_where_they_begin():
    text = entry(
        "%a = f32[4]{0} parameter(0)",
        "%b = bf16[2]{0} parameter(1)",
        "%r = (f32[4]{0}, bf16[2]{0}) all-reduce-start(%a, %b), to_apply=%add",
        "%d = (f32[4]{0}, bf16[2]{0}) all-reduce-done(%r)",
        "%g = (f32[4]{0}, f32[16]{0}) all-gather-start(%a), dimensions={0}",
        "%h = f32[16]{0} all-gather-done(%g)",
        "%s = f32[1]{0} reduce-scatter(%a), dimensions={0}, to_apply=%add",
        "ROOT %t = (f32[16]{0}) tuple(%h)",
    )
    launched = kernels.launches(text)
    assert launched == [
        Kernel("all-reduce", 40, 1),
        Kernel("all-gather", 80, 1),
        Kernel("reduce-scatter", 20, 1),
    ]
    assert all(kernel.kind in kernels.COLLECTIVES for kernel in launched)
    assert kernels.count([*launched, launched[1]]) == {
        "all-gather": 2,
        "all-reduce": 1,
        "reduce-scatter": 1,
    }


def test_what_is_wrapped_to_run_beside_others_is_found():
    wrapped = (
        "%wrapped (p: f32[4]) -> f32[4] {\n"
        "  %p = f32[4]{0} parameter(0)\n"
        "  ROOT %s = f32[4]{0} all-to-all(%p), dimensions={0}\n"
        "}\n"
    )
    text = entry(
        "%a = f32[4]{0} parameter(0)",
        "%b = ((f32[4]{0}), f32[4]{0}) async-start(%a), calls=%wrapped",
        "ROOT %c = f32[4]{0} async-done(%b)",
        before=wrapped,
    )
    assert kernels.launches(text) == [Kernel("all-to-all", 32, 1)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it has no ENTRY"),
        ("%f (p: f32[4]) -> f32[4] {\n}\n", "it has no ENTRY"),
        (entry("ROOT %m = f32[4]{0} copy(%lost)"), "it lacks 'lost'"),
        (entry("ROOT %m = f32[4]{0} call(), to_apply=%lost"), "it lacks 'lost'"),
        (entry("ROOT %m = (f32[4]{0}, f32[4"), "an open parenthesis"),
    ],
)
def test_a_text_that_is_no_program(text, words):
    with pytest.raises(ValueError, match="no (whole )?program of XLA") as raised:
        kernels.launches(text)
    assert words in str(raised.value)
