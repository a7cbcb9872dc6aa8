"""The real engine on a GPU: the dense answer where everything fits into the budget, and one answer whatever the engine
does (CUDA graphs, chunked prefill, prefix caching, batching).

Prompt tokens that select do so with their neighbours, 64 of them at most: it is one answer where pieces of a prompt end
at multiples of 64, and what was generated may have other keys and values when it is computed again as part of a prompt.
"""

import math
import statistics
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from .conftest import LLAMA, ONE_LEVEL, random_prompt, save_random_model, start_engine
from .test_sinks import save_gpt_oss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

MODEL = {
    **LLAMA,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "dtype": "float16",
}
LENGTHS = (5, 63, 64, 65, 500, 512, 513, 1000, 2049, 3000)
BUDGET = 512
TOKENS = 80
LONG = 400
TOP = 20  # log-probabilities that are asked for
# In nats: differences of log-probabilities after the same tokens, on average and at most. Dense attention differs by
# float16's rounding. With random weights pages weigh much the same, so that rounding also decides between two of them.
ROUNDING = (0.005, 0.05)
SELECTION = (0.03, 1.0)
# Noise in the last digits of keys, which other shapes of matrix products bring, decides how a mean near the middle of
# two stored numbers is rounded. These lie 128 times as far from each other in fp8 as in float16: scores move more.
SELECTION_FP8 = (0.06, 3.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("gpu") / "llama", MODEL, std=0.05)


@dataclass
class Answer:
    tokens: list[int]
    logprobs: list[dict[int, float]]  # of the best tokens at each place


SPARSE = {"budget": BUDGET, **ONE_LEVEL}
ENGINE_ARGS = {
    "dtype": "float16",
    "max_model_len": 4096,
    "block_size": 64,
    "enforce_eager": False,
    "max_num_batched_tokens": 9216,  # all prompts at once, none in pieces
    "gpu_memory_utilization": 0.2,
    "kv_cache_memory_bytes": 1 << 30,  # nothing is measured: others may use the GPU meanwhile
    "cudagraph_capture_sizes": [1, 2, 4, 8, 16],
}


def start(model, backend="spla", options=SPARSE, **engine_args):
    """An engine in which prompts are sparse wherever they can be."""
    if options is not None:
        options = {"prefill_dense_below": 0, **options}
    return start_engine(model, backend, options, **ENGINE_ARGS | engine_args)


def generate(engine, prompts, tokens=TOKENS):
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=TOP)
    outputs = engine.llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    return [
        Answer(list(o.token_ids), [{token: x.logprob for token, x in entry.items()} for entry in o.logprobs])
        for o in (output.outputs[0] for output in outputs)
    ]


PROMPTS = [random_prompt(n, seed=n) for n in LENGTHS]


def ask(model, backend, options=None, **engine_args):
    """What such an engine answers."""
    with start(model, backend, options, **engine_args) as engine:
        return generate(engine, PROMPTS)


def mean_and_worst(found):
    mean, worst = statistics.mean(found), max(found)
    print(f"log-probabilities differ by {mean:.4f} on average, {worst:.4f} at most")
    return mean, worst


def differences(actual, expected):
    """Mean and maximum over what can be compared: tokens' log-probabilities up to where other tokens were chosen.

    There the two chosen tokens were about equally likely, which the comparison shows: both are among the best of both
    answers, or a difference of infinity is reported.
    """
    found = []
    for a, e in zip(actual, expected, strict=True):
        length = len(e.tokens)
        same = next((i for i, (x, y) in enumerate(zip(a.tokens, e.tokens, strict=True)) if x != y), length)
        for ours, theirs in zip(a.logprobs[: same + 1], e.logprobs[: same + 1], strict=True):
            best = sorted(theirs, key=theirs.get)[-2:]
            found += [abs(ours.get(token, -math.inf) - theirs[token]) for token in best]
        if same < length:
            gap = e.logprobs[same][e.tokens[same]] - e.logprobs[same].get(a.tokens[same], -math.inf)
            print(f"another token at {same}, {gap:.4f} nats less likely")
            found.append(gap)
    return mean_and_worst(found)


def assert_same(actual, expected, tolerance=SELECTION):
    mean, worst = differences(actual, expected)
    assert mean < tolerance[0] and worst < tolerance[1]


@dataclass
class Plain:
    """What one engine answers: starting engines is what takes time here."""

    batch: list[Answer]  # all prompts at once
    alone: list[Answer]  # one by one


@pytest.fixture(scope="module")
def plain(model):
    with start(model) as engine:
        return Plain(generate(engine, PROMPTS), [generate(engine, [prompt])[0] for prompt in PROMPTS])


@pytest.fixture(scope="module")
def sparse(plain):
    return plain.batch


PIECES = {"max_num_batched_tokens": 256, "max_num_seqs": 1}  # nothing beside them: they end at multiples of 256
FINE = {"selector": "km2-rem", "selection_block_size": 16}


def test_whole_budget_is_dense(model):
    dense = ask(model, "FLASH_ATTN")
    assert_same(ask(model, "spla", {"budget": 4096}), dense, ROUNDING)
    assert_same(ask(model, "spla", {"budget": 4096, **FINE}), dense, ROUNDING)


@pytest.fixture(scope="module")
def fine(model):
    return ask(model, "spla", {**SPARSE, **FINE})


def test_finer_blocks_eager_equals_graphs(model, fine):
    assert_same(ask(model, "spla", {**SPARSE, **FINE}, enforce_eager=True), fine)


def test_finer_blocks_chunked_prefill(model, fine):
    assert_same(ask(model, "spla", {**SPARSE, **FINE}, **PIECES), fine)


@pytest.fixture(scope="module")
def even_model(tmp_path_factory):
    """Smaller weights make attention less peaked: blocks at the threshold seldom hold a token that weighs much.

    In `model` some do, and where rounding decides about one, log-probabilities move by nats: second-best tokens leave
    the `TOP` best. Here they move far less than by what is left out, and so less than the tolerance.
    """
    return save_random_model(tmp_path_factory.mktemp("gpu") / "even", MODEL, std=0.03)


@pytest.mark.parametrize("source", ["keys", "int4"])
@pytest.mark.parametrize("dense_below", [None, 0], ids=["dense-prompts", "sparse-prompts"])
def test_two_levels(even_model, source, dense_below):
    """One answer by graphs, without them, and where prompts come in pieces or from the cache; the dense one where
    everything fits into the budget."""
    two_levels = {
        "budget": BUDGET,
        "candidates": 2 * BUDGET,
        "fine_source": source,
        "prefill_dense_below": dense_below,
    }
    expected = ask(even_model, "spla", two_levels)
    assert_same(ask(even_model, "spla", two_levels, enforce_eager=True), expected)
    pieces = PIECES if dense_below == 0 else {**PIECES, "max_num_seqs": 16}
    with start(even_model, "spla", two_levels, enable_prefix_caching=True, **pieces) as engine:
        for _ in range(2):
            assert_same(generate(engine, PROMPTS), expected)
    dense = ask(even_model, "FLASH_ATTN")
    assert_same(ask(even_model, "spla", {**two_levels, "budget": 4096}), dense, ROUNDING)
    long = [i for i, length in enumerate(LENGTHS) if length > 2 * BUDGET]  # beyond the candidates
    mean, _ = differences([expected[i] for i in long], [dense[i] for i in long])
    assert mean > 2 * SELECTION[0]  # it did leave something out


# bfloat16 has an eighth of float16's digits. All experts take part, so that rounding does not decide which do.
GPT_OSS = {
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_local_experts": 2,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
}
BFLOAT16_ROUNDING = tuple(8 * x for x in ROUNDING)


def test_sinks(tmp_path):
    """gpt-oss, its windows in FlashAttention: the dense answer where everything fits into the budget, beside a dense
    layer; one answer by graphs, and without them in pieces."""
    model, arguments = save_gpt_oss(tmp_path / "gpt-oss", std=0.03, **GPT_OSS), {"dtype": "bfloat16"}
    dense = ask(model, "FLASH_ATTN", **arguments)
    whole = ask(model, "spla", {"budget": 4096, "dense_layers": [1]}, **arguments)
    assert_same(whole, dense, BFLOAT16_ROUNDING)
    with start(model, **arguments) as engine:
        layers = engine.runner.compilation_config.static_forward_context.values()
        steps = [layer.impl.op.steps for layer in layers if layer.get_attn_backend().get_name() == "SPLA"]
        assert len(steps) == 2 and all(of_layer.fused is None for of_layer in steps)
        sparse = generate(engine, PROMPTS)
    long = [i for i, length in enumerate(LENGTHS) if length > BUDGET]
    differences([sparse[i] for i in long], [dense[i] for i in long])  # prints what was left out
    pieces = ask(model, "spla", SPARSE, enforce_eager=True, **PIECES, **arguments)
    assert_same(pieces, sparse, tuple(2 * x for x in SELECTION))


def test_eager_equals_graphs(model, sparse):
    assert_same(ask(model, "spla", SPARSE, enforce_eager=True), sparse)


@pytest.mark.parametrize("size", [64, 1024])
def test_chunked_prefill(model, sparse, size):
    assert_same(ask(model, "spla", SPARSE, max_num_batched_tokens=size, max_num_seqs=1), sparse)


def test_chunked_dense_prompts(even_model):
    """Decodes and pieces of prompts share steps here."""
    options = {**SPARSE, "prefill_dense_below": 4096}
    pieces = ask(even_model, "spla", options, max_num_batched_tokens=100, max_num_seqs=16)
    assert_same(pieces, ask(even_model, "spla", options))


def test_prefix_caching(model, sparse):
    """Whole prompts again, and prompts that share a prefix of an awkward length."""
    from vllm import SamplingParams

    with start(model, enable_prefix_caching=True) as engine:
        for _ in range(3):
            assert_same(generate(engine, PROMPTS), sparse)
        for shared in (650, 1472, 2047):
            engine.llm.generate(
                [{"prompt_token_ids": PROMPTS[-1][:shared] + random_prompt(300, seed=shared)}],
                SamplingParams(max_tokens=70, ignore_eos=True, detokenize=False),
                use_tqdm=False,
            )
            assert_same(generate(engine, PROMPTS), sparse)


def test_each_prompt_alone(plain):
    assert_same(plain.alone, plain.batch)


def test_preemption(model):
    """The pool holds the prompts, but not the answers too. The budget holds everything: what was generated is computed
    again as part of a prompt."""
    options = {"budget": 4096}
    with start(model, options=options) as engine:
        expected = generate(engine, PROMPTS[-3:], LONG)
    with start(model, options=options, num_gpu_blocks_override=113) as engine:
        preempted = engine.preemptions()
        assert_same(generate(engine, PROMPTS[-3:], LONG), expected)
    assert preempted, "the cache was large enough for everything: the test shows nothing"


LIMIT = 1200  # tokens of a sequence where drafts are cut off


def ask_to_the_limit(model, options, **engine_args):
    """What is answered up to the last token of the model's length. Most tokens occurred before: there are drafts."""
    prompts = [random_prompt(n, seed=n) for n in (3, 700, 1000, 1050, 1101, 1150, 1180, 1196, 1199)]
    with start(model, options=options, max_model_len=LIMIT, **engine_args) as engine:
        answers = generate(engine, prompts, LIMIT)
    assert [len(p) + len(a.tokens) for p, a in zip(prompts, answers, strict=True)] == [LIMIT] * len(prompts)
    return answers


@pytest.fixture(scope="module", params=[BUDGET, 2 * LIMIT], ids=["select", "whole-budget"])
def without_drafts(request, model):
    options = {"budget": request.param, **ONE_LEVEL}
    return options, ask_to_the_limit(model, options)


@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize(("method", "is_async"), [("ngram", False), ("ngram_gpu", True)], ids=["sync", "async"])
def test_drafts_cut_off(model, without_drafts, monkeypatch, method, is_async, eager):
    """Rows of one step have unequal numbers of drafts, all of them are decode rows, and drafts change no answer."""
    from spla_backend.engine.builder import SplaMetadataBuilder

    steps, original = [], SplaMetadataBuilder._step

    def step(self, common):
        result = original(self, common)
        steps.append((common.query_start_loc_cpu.diff().tolist(), result.num_decodes))
        return result

    monkeypatch.setattr(SplaMetadataBuilder, "_step", step)
    options, expected = without_drafts
    drafts = {"method": method, "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    answers = ask_to_the_limit(
        model, options, speculative_config=drafts, async_scheduling=is_async, enforce_eager=eager,
        cudagraph_capture_sizes=[5, 10, 20, 40, 80],
    )  # fmt: skip
    # More tokens are compared than elsewhere, so that the worst of them is worse.
    assert_same(answers, expected, SELECTION if options["budget"] == BUDGET else (ROUNDING[0], 4 * ROUNDING[1]))
    unequal = [(lens, n) for lens, n in steps if max(lens) <= 5 and len({x for x in lens if x}) > 1]
    assert len(unequal) > 5 and all(n == len(lens) for lens, n in unequal)


def test_double_rmsnorm_served_as_trained(tmp_path):
    """Log-probabilities of a prompt as transformers gives them: within the budget, for beyond it the tokens that are
    trained select alone."""
    from transformers import AutoModelForCausalLM

    from spla_backend.training import attach, save

    start = save_random_model(tmp_path / "start", {**LLAMA, "dtype": "float16"}, std=0.05)
    trained = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float16).cuda().eval()
    options = {"residual": "linear", "combine": "double_rmsnorm", "selector": "taylor2"}
    attach(trained, {**SPARSE, **options}, 64)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trained.named_parameters():
        if ".spla." in name:
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator).cuda()
    save(trained, tmp_path / "trained")
    prompt = random_prompt(900, seed=0)
    ids = torch.tensor([prompt]).cuda()
    with torch.no_grad():
        logprobs = trained(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
    expected = logprobs.gather(-1, ids[0, 1:, None])[:, 0].cpu()
    arguments = {
        name: ENGINE_ARGS[name] for name in ("dtype", "block_size", "gpu_memory_utilization", "kv_cache_memory_bytes")
    }
    with start_engine(str(tmp_path / "trained"), options={"budget": BUDGET}, **arguments) as engine:
        error = (torch.tensor(engine.answer([prompt], max_tokens=1)[0].logprobs) - expected).abs()
    print(
        f"mean difference within the budget {error[: BUDGET - 1].mean():.1e}, beyond {error[BUDGET - 1 :].mean():.1e}"
    )
    assert error[: BUDGET - 1].mean() < 0.01


def prompt_then_answer(inputs, layers, prompt):
    """What the kernels compute of a layer: so many tokens of a prompt, whose tiles select, and tokens that were
    generated, each of which does."""
    from spla_backend.evaluate.fidelity import attention_in_pieces
    from spla_backend.kernels.gpu.prefill.plan import prompt_parameters

    if inputs.layer not in layers:
        return None
    decode = layers[inputs.layer]
    tiles = prompt_parameters(decode, inputs.q.shape[0] // inputs.k.shape[0])
    dense = min(prompt, -(-tiles.whole_tokens // tiles.coarse_tile) * tiles.coarse_tile)
    pieces = [(0, dense, None), (dense, prompt, tiles), (prompt, inputs.q.shape[1], decode)]
    return attention_in_pieces(inputs, pieces)


@pytest.mark.parametrize(
    "options",
    [
        {**SPARSE, "dense_layers": [0, 1, 3]},
        {**ONE_LEVEL, "budget": 4096, "layer_budgets": {"0": 1024, "2": BUDGET}},
    ],
    ids=["dense", "budgets"],
)
def test_layers_that_differ(model, options):
    """The algorithm's token in almost every step, where dense attention has others. Most layers see everything: where
    many select, rounding decides too often. How much it decides is seen in the algorithm itself, in float32."""
    from spla_backend.evaluate.capture import CapturingModel
    from spla_backend.options import SplaOptions

    answers = ask(model, "spla", options)
    layers = SplaOptions.from_sources(options).layers(64, range(MODEL["num_hidden_layers"]))
    exact = CapturingModel(model, torch.float32, "cuda", head=True)
    rounded = CapturingModel(model, torch.float16, "cuda", head=True)
    kinds = {"spla": (rounded, True), "dense": (rounded, False), "exact": (exact, True)}
    differing, gaps = dict.fromkeys(kinds, 0), {kind: 0.0 for kind in kinds}
    rounding = 0.0  # how far the algorithm's two precisions are apart where they choose different tokens
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        best, logprobs = {}, {}
        visit = partial(prompt_then_answer, layers=layers, prompt=len(prompt))
        for kind, (reference, selects) in kinds.items():
            logits = reference.run(prompt + answer.tokens[:-1], visit if selects else None).logits[0, len(prompt) - 1 :]
            logprobs[kind], best[kind] = logits.float().log_softmax(-1), logits.argmax(-1)
            for token, likely, ours in zip(best[kind].tolist(), answer.logprobs, answer.tokens, strict=True):
                if token != ours:
                    differing[kind] += 1
                    gaps[kind] = max(gaps[kind], likely[ours] - likely.get(token, -math.inf))
        for kind, other in (("spla", "exact"), ("exact", "spla")):
            of_own, of_other = (logprobs[kind].gather(1, best[k][:, None]) for k in (kind, other))
            rounding = max(rounding, float((of_own - of_other).max()))
    print(f"tokens that differ from the reference's: {differing}, by at most {gaps}; by rounding alone: {rounding}")
    assert differing["spla"] < 0.5 * differing["dense"]
    assert gaps["spla"] < max(SELECTION[1], 2 * rounding)  # the engine and the reference are both rounded


BUDGETS = {**SPARSE, "layer_budgets": {"0": 1024, "1": 256, "3": 2048}}


def test_budgets_of_layers_eager_chunked(model):
    """Many plans and one scratch: the same answers in pieces and without graphs."""
    whole = ask(model, "spla", BUDGETS)
    assert_same(ask(model, "spla", BUDGETS, enforce_eager=True, **PIECES), whole)


def test_budgets_of_layers_flashinfer(model):
    pytest.importorskip("flashinfer")
    assert_same(ask(model, "spla", BUDGETS | {"executor": "flashinfer"}), ask(model, "spla", BUDGETS))


def test_statistics_in_fp8(even_model):
    """One answer with CUDA graphs, and eager in chunks."""
    options = {**SPARSE, "statistics_dtype": "fp8"}
    graphs = ask(even_model, "spla", options)
    assert_same(graphs, ask(even_model, "spla", options, enforce_eager=True, **PIECES), SELECTION_FP8)


@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
def test_flashinfer_executor(model, sparse, eager):
    pytest.importorskip("flashinfer")
    options = {**SPARSE, "executor": "flashinfer"}
    assert_same(ask(model, "spla", options, enforce_eager=eager), sparse)


def test_sparse_is_sparse(model, sparse):
    """Or the tests above show nothing: long prompts answer differently with a small budget and no residual."""
    other = ask(model, "spla", {**SPARSE, "budget": 256, "residual": "none"})
    long = [i for i, length in enumerate(LENGTHS) if length > 2 * BUDGET]
    mean, _ = differences([other[i] for i in long], [sparse[i] for i in long])
    assert mean > 2 * SELECTION[0]
