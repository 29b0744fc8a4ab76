"""Hyper-parameters of Lightning OPD (arXiv 2604.13010v2): models and data of section 4, tables 5 (SFT) and 6 (OPD), evaluation of section 4.1."""

from attrs import evolve, frozen

MATH = "Question: {prompt}\nPlease reason step by step, and put your final answer within \\boxed{}."


@frozen
class Recipe:
    """Everything that decides the result; kept in the run's folder, and compared when a run is resumed.

    Args:
        teacher: folder or hub name of the SFT teacher, who is the OPD teacher too.
        student: folder or name of the base model; or of an OPD student to go on from, with `sft_steps` 0.
        teacher_billions, student_billions: parameters, for the estimate.
        template: the text around a problem; `{prompt}` stands for it.
        sft_texts: prompts that the teacher answers.
        sft_tokens: longest of these answers.
        sft_steps, sft_rollouts_per_step, sft_lr, sft_warmup: settings of SFT; the rate rises for this share of the steps and falls by a cosine.
        rollouts: prompts that the SFT student answers, once each.
        max_new_tokens: longest of these answers.
        temperature, top_p: with which they are drawn.
        opd_steps, opd_rollouts_per_step, opd_lr, weight_decay, clip: settings of OPD, at a constant rate; clip in nats.
        ratio_to_ref: weigh each token by its ratio to what drew it; the paper does not, and at its temperature the gradient is biased then.
        tokens_per_batch: positions of one forward pass of training.
        test_samples, test_temperature, test_top_p, test_tokens: settings of the evaluation.
        tflops: 10^12 floating-point operations a second of one GPU, dense bfloat16, as its maker has them; for the estimate.
        gpus: in the machine; of them `teacher_gpus` and `student_gpus` hold one model in vLLM, and training is sharded over `training_gpus`.
        device, dtype: device and dtype of training.
    """

    teacher: str
    student: str
    teacher_billions: float
    student_billions: float
    template: str = MATH
    sft_texts: int = 300_000
    sft_tokens: int = 16_384
    sft_steps: int = 3000
    sft_rollouts_per_step: int = 256
    sft_lr: float = 8e-5
    sft_warmup: float = 0.1
    rollouts: int = 17_400
    max_new_tokens: int = 4096
    temperature: float = 0.8
    top_p: float = 1.0
    opd_steps: int = 150
    opd_rollouts_per_step: int = 256
    opd_lr: float = 2e-6
    weight_decay: float = 0.1
    clip: float = 10.0
    ratio_to_ref: bool = False
    tokens_per_batch: int = 16_384
    test_samples: int = 32
    test_temperature: float = 0.6
    test_top_p: float = 0.95
    test_tokens: int = 32_768
    tflops: float = 989.0
    gpus: int = 8
    teacher_gpus: int = 2
    student_gpus: int = 1
    training_gpus: int = 8
    device: str = "cuda"
    dtype: str = "bfloat16"
    seed: int = 42


_4B = Recipe("Qwen/Qwen3-8B", "Qwen/Qwen3-4B-Base", 8.2, 4.0)
_8B = Recipe("Qwen/Qwen3-32B", "Qwen/Qwen3-8B-Base", 32.8, 8.2, sft_rollouts_per_step=128, teacher_gpus=4)
#: Code goes on from the student of math: pass its folder as `--student`.  The answers are programs, which `recipes.grading` does not run.
_CODE = {"template": "{prompt}", "sft_texts": 0, "sft_steps": 0, "rollouts": 30_000}
RECIPES = {
    "qwen3-4b-math": _4B,
    "qwen3-4b-code": evolve(_4B, student="", **_CODE),
    "qwen3-8b-math": _8B,
    "qwen3-8b-code": evolve(_8B, student="", **_CODE),
}
