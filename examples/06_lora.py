"""LoRA: the student is a peft model, its adapters are all that is trained and saved, and merged into the weights they make an engine's model."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import HELD_OUT, QUESTIONS, model_folders
from transformers import GenerationConfig

from lopd import (
    CausalLMStudent,
    FusedOPDLoss,
    MemoryStore,
    SamplingParams,
    batches,
    collect_rollouts,
    evaluate_reverse_kl,
    opd_steps,
    save_checkpoint,
    score_rollouts,
)
from lopd.engines.hf import HFScorer, HFSource, load_model
from lopd.records import make_prompts

student_dir, teacher_dir = model_folders()  # replace these and the questions by your own
sampling = SamplingParams(max_new_tokens=12, samples_per_prompt=4)
source, scorer = HFSource.from_folder(student_dir, sampling), HFScorer.from_folder(teacher_dir)
store = MemoryStore(source.manifest)
collect_rollouts(source, make_prompts(QUESTIONS, source.tokenizer), store)
score_rollouts(store, scorer)

base, tokenizer = load_model(student_dir, torch.float32)
# Not on lm_head: the loss reads the head as it is.
config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM")
torch.manual_seed(0)  # of the adapters
student = CausalLMStudent(get_peft_model(base, config), tokenizer)
trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
print(f"trains {sum(p.numel() for p in trained):,} of {sum(p.numel() for p in student.parameters()):,} parameters")

optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.0)
steps = batches(store, rollouts_per_step=32, ref="behavior")[:16]
for metrics in opd_steps(student, steps, FusedOPDLoss(ratio_to_ref=True), optimizer):
    print(f"step {metrics.step:2d}: gap to the teacher {metrics.reverse_kl:+.3f}")
checkpoint = save_checkpoint("runs/06/checkpoints", student, optimizer, next_step=metrics.step + 1, steps=steps)
print(f"a checkpoint has {(checkpoint / 'parameters.safetensors').stat().st_size:,} bytes of weights")

student.export("runs/06/adapters", tokenizer, steps.lineage)  # what peft loads
untrained, _ = load_model(student_dir, torch.float32)  # AutoPeftModelForCausalLM draws rows for ids that the head has none for
merged = PeftModel.from_pretrained(untrained, "runs/06/adapters").merge_and_unload()
merged.generation_config = GenerationConfig.from_pretrained("runs/06/adapters")  # what ends a response; peft takes that of the base
CausalLMStudent(merged.requires_grad_(True), tokenizer).export("runs/06/merged", tokenizer, steps.lineage)  # what any engine loads
held_out = make_prompts(HELD_OUT, tokenizer)
before = evaluate_reverse_kl(source, scorer, held_out)
after = evaluate_reverse_kl(HFSource(merged, tokenizer, sampling), scorer, held_out)
print(f"held-out reverse KL, nats a token: {before.mean:.3f} ± {before.ci95:.3f} before, {after.mean:.3f} ± {after.ci95:.3f} after")
