"""The real engine on a GPU: the dense answer where everything fits into the budget, and one answer whatever the engine
does (CUDA graphs, chunked prefill, prefix caching, batching)."""

from functools import partial

import pytest
import torch

from .conftest import LLAMA, random_prompt, save_random_model, start_engine

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
NEAR_TIE = 0.03  # nats between the two best tokens: float16 may go either way
# Pages of random weights weigh much the same: rounding decides between two of them, and that moves logits.
SPARSE_NEAR_TIE = 0.3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("gpu") / "llama", MODEL, std=0.05)


def ask(model, backend, options=None, rounds=1, **engine_args):
    """Tokens and the gaps between the two best, by round and prompt; prompts are sparse wherever they can be."""
    from vllm import SamplingParams

    if options is not None:
        options = {"prefill_dense_below": 0, **options}

    sampling = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True, detokenize=False, logprobs=2)
    prompts = [{"prompt_token_ids": random_prompt(n, seed=n)} for n in LENGTHS]
    arguments = {
        "dtype": "float16",
        "max_model_len": 4096,
        "block_size": 64,
        "enforce_eager": False,
        "max_num_batched_tokens": 4096,
        "gpu_memory_utilization": 0.2,
        "kv_cache_memory_bytes": 1 << 30,  # nothing is measured: others may use the GPU meanwhile
        "cudagraph_capture_sizes": [1, 2, 4, 8, 16],
        **engine_args,
    }
    with start_engine(model, backend, options, **arguments) as engine:
        answers = []
        for _ in range(rounds):
            outputs = engine.llm.generate(prompts, sampling, use_tqdm=False)
            answers.append(
                [
                    (
                        list(o.outputs[0].token_ids),
                        [
                            (lambda best: best[0] - best[1])(sorted((x.logprob for x in entry.values()), reverse=True))
                            for entry in o.outputs[0].logprobs
                        ],
                    )
                    for o in outputs
                ]
            )
        return answers


def assert_same(actual, expected, near_tie=NEAR_TIE):
    """Equal tokens up to a near-tie; few rows may end in one."""
    ties = 0
    for length, (a, a_gaps), (e, e_gaps) in zip(LENGTHS, actual, expected, strict=True):
        differing = [i for i, (x, y) in enumerate(zip(a, e, strict=True)) if x != y]
        if differing:
            i = differing[0]
            gap = min(a_gaps[i], e_gaps[i])
            print(f"prompt of {length}: first difference at token {i}, where the two best are {gap:.4f} nats apart")
            assert gap < near_tie, f"prompt of {length}: token {i} differs, gap {gap}"
            ties += 1
    assert ties <= len(LENGTHS) // 2


@pytest.fixture(scope="module")
def sparse(model):
    return ask(model, "spla", {"budget": BUDGET})[0]


FINE = {"selector": "km2-rem", "selection_block_size": 16}


def test_whole_budget_is_dense(model):
    dense = ask(model, "FLASH_ATTN")[0]
    assert_same(ask(model, "spla", {"budget": 4096})[0], dense)
    assert_same(ask(model, "spla", {"budget": 4096, **FINE})[0], dense)


def test_finer_blocks(model):
    options = {"budget": BUDGET, **FINE}
    graphs = ask(model, "spla", options)[0]
    eager = ask(model, "spla", options, enforce_eager=True, max_num_batched_tokens=256)[0]
    assert_same(eager, graphs, SPARSE_NEAR_TIE)


def test_eager_equals_graphs(model, sparse):
    assert_same(ask(model, "spla", {"budget": BUDGET}, enforce_eager=True)[0], sparse, SPARSE_NEAR_TIE)


@pytest.mark.parametrize("size", [64, 100, 1024])
def test_chunked_prefill(model, sparse, size):
    arguments = {"max_num_batched_tokens": size, "max_num_seqs": 16}
    assert_same(ask(model, "spla", {"budget": BUDGET}, **arguments)[0], sparse, SPARSE_NEAR_TIE)


def test_prefix_caching(model, sparse):
    for answers in ask(model, "spla", {"budget": BUDGET}, rounds=3, enable_prefix_caching=True):
        assert_same(answers, sparse, SPARSE_NEAR_TIE)


def test_small_batches(model, sparse):
    assert_same(ask(model, "spla", {"budget": BUDGET}, max_num_seqs=3)[0], sparse, SPARSE_NEAR_TIE)


def test_double_rmsnorm_served_as_trained(tmp_path):
    """Log-probabilities of a prompt, within the budget and beyond it, as transformers gives them."""
    from transformers import AutoModelForCausalLM

    from spla_backend.training import attach, save

    start = save_random_model(tmp_path / "start", {**LLAMA, "dtype": "float16"}, std=0.05)
    trained = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float16).cuda().eval()
    options = {"residual": "linear", "combine": "double_rmsnorm", "selector": "taylor2"}
    attach(trained, {"budget": BUDGET, **options}, 64)
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
    arguments = {"dtype": "float16", "block_size": 64, "gpu_memory_utilization": 0.1, "options": {"budget": BUDGET}}
    with start_engine(str(tmp_path / "trained"), **arguments) as engine:
        error = (torch.tensor(engine.answer([prompt], max_tokens=1)[0].logprobs) - expected).abs()
    print(
        f"mean difference within the budget {error[: BUDGET - 1].mean():.1e}, beyond {error[BUDGET - 1 :].mean():.1e}"
    )
    assert error[: BUDGET - 1].mean() < 0.01 and error[BUDGET - 1 :].mean() < 0.05


def test_dense_layers(model):
    """All but one layer dense: the algorithm's token in almost every step, where dense attention has others."""
    from spla_backend.evaluate.capture import CapturingModel
    from spla_backend.evaluate.fidelity import attention
    from spla_backend.evaluate.variants import Variant, parameters_of

    answers = ask(model, "spla", {"budget": BUDGET, "dense_layers": [0, 1, 3]})[0]
    reference = CapturingModel(model, torch.float16, "cuda", head=True)
    params = parameters_of(Variant("spla", {"budget": BUDGET}), 64, None)
    visits = {"spla": partial(attention, params=params, dense_layers=[0, 1, 3]), "dense": None}
    differing = dict.fromkeys(visits, 0)
    for length, (tokens, gaps) in zip(LENGTHS, answers, strict=True):
        for name, visit in visits.items():
            logits = reference.run(random_prompt(length, seed=length) + tokens[:-1], visit).logits[0, length - 1 :]
            best = logits.argmax(-1).tolist()
            wrong = [gap for ours, gap, theirs in zip(tokens, gaps, best, strict=True) if ours != theirs]
            assert name == "dense" or all(gap < SPARSE_NEAR_TIE for gap in wrong), f"prompt of {length}: {wrong}"
            differing[name] += len(wrong)
    print(f"tokens that differ from the reference's: {differing}")
    assert differing["spla"] < 0.5 * differing["dense"]


@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
def test_flashinfer_executor(model, sparse, eager):
    pytest.importorskip("flashinfer")
    options = {"budget": BUDGET, "executor": "flashinfer"}
    assert_same(ask(model, "spla", options, enforce_eager=eager)[0], sparse, SPARSE_NEAR_TIE)


def test_sparse_is_sparse(model, sparse):
    """Or the tests above show nothing: long prompts answer differently with a small budget and no residual."""
    other = ask(model, "spla", {"budget": 256, "residual": "none"})[0]
    assert any(a[0] != s[0] for n, a, s in zip(LENGTHS, other, sparse, strict=True) if n > 2 * BUDGET)
    assert all(a[0] == s[0] for n, a, s in zip(LENGTHS, other, sparse, strict=True) if n < 100)
