"""The model being trained: any transformers causal LM, cut below its head, full or with peft adapters."""

import math
from operator import index
from pathlib import Path
from typing import Any, Protocol, final

import torch
from attrs import evolve
from torch import Tensor, nn

from lopd.engines.causal_lm import context_length, cut_to_head, decoder_of, lm_head, recompute_layers, stated_ends, unwrap, without_runners
from lopd.engines.conditions import check_trained_dtype, warn_of_dropout
from lopd.engines.export import check_exportable, export_model
from lopd.engines.inputs import stop_ids
from lopd.engines.probes import check_training, refusing
from lopd.errors import ContextOverflowError, InvalidRecordError, ModelError, ModelWarning
from lopd.guards.consistency import check_vocabulary
from lopd.protocols import OPDLoss
from lopd.records.checks import check_kind
from lopd.records.devices import check_device
from lopd.records.identity import TokenizerId, TokenizerLike, fingerprint_tokenizer
from lopd.records.lineage import Lineage
from lopd.records.manifest import SamplingParams
from lopd.records.paths import local_path
from lopd.records.ranks import Ranks, on_first, prepare_sharded, sharded
from lopd.records.steps import Batch, LossOutput
from lopd.records.values import is_plain
from lopd.records.warn import warn_user


class _Saved(TokenizerLike, Protocol):
    """What an export needs of a tokenizer."""

    def save_pretrained(self, folder: Path, /) -> Any:
        """Write it."""
        ...


@final
class CausalLMStudent(nn.Module):
    """A `Student` around a transformers causal LM.

    Args:
        model: a causal LM, or a peft model around one.  Parameters that require a gradient are trained, the rest stay as they are.
        tokenizer: whose ids the model reads: the one that belongs to it, or its fingerprint.  Head rows beyond its
            vocabulary are padding and get no mass; neither do added tokens beyond the rows, which a fingerprint does not tell from others.
        autocast: compute the layers below the head in this dtype (torch.bfloat16) while the weights stay in theirs.  Pass it to `load_model` too,
            which then finds an attention for it.
        gradient_checkpointing: recompute activations in the backward pass; less memory, about a third more time.  A model that does so already
            keeps its own options, except `use_reentrant`, which becomes False.

    Warns:
        ModelWarning: torch.compile is around the model as a whole, where it does nothing; the model also reads images, and the files of its
            processor are not where it was loaded from; its adapters could not be exported, since it was changed under them, or are
            frozen while something else is trained; or what `lopd.engines.probes.check_training` warns of.

    Raises:
        ModelError: the model has nothing to train, would be trained in float16, could not be exported, or cannot be trained here
            (`lopd.engines.probes.check_training`).
        StoreWriteError: the folder for temporary files, where saving is tried, has no space.
        ArgumentError: model or tokenizer are something else.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: TokenizerId | TokenizerLike,
        *,
        autocast: torch.dtype | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.tokenizer = fingerprint_tokenizer(tokenizer)
        self._known = cut_to_head(model, tokenizer).vocab_size
        self._layers = check_training(model, self._known, autocast)
        if not any(p.requires_grad for p in model.parameters()):
            raise ModelError(
                f"Model {type(unwrap(model)).__name__}: 0 of its parameters require a gradient, expected at least 1; unfreeze some, "
                "or load adapters as trainable (`PeftModel.from_pretrained(base, folder, is_trainable=True)`)."
            )
        check_trained_dtype(model, autocast)
        check_exportable(model, tokenizer)
        self._changed_base = _check_adapters(model, before=True)
        if unwrap(model)._compiled_call_impl is not None or hasattr(model, "_orig_mod"):
            warn_user(
                f"Model {type(unwrap(model)).__name__}: its torch.compile is passed by, since a student computes the layers below the head by "
                "themselves; call `student.compile()`.",
                ModelWarning,
            )
        self.model = model
        # accelerate, and so Trainer, reads here which modules FSDP2 shards
        self._no_split_modules = getattr(unwrap(model), "_no_split_modules", None)
        self._autocast = autocast
        if gradient_checkpointing:
            with refusing(model, "training", "leave out `gradient_checkpointing`"):
                recompute_layers(model)
        self._dropout_is_judged = False
        # a model that was put in training mode keeps the modules in eval that its owner put there; wrappers are new, and do not record that
        if not unwrap(model).training:
            self.train()

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids at which its responses will end, once it is exported and sampled from: the model's and the tokenizer's EOS."""
        return stop_ids(SamplingParams(), stated_ends(self.model), self.tokenizer)

    def stop_at(self, token: int) -> None:
        """Let its responses end at this token, too, as those that it is taught do: its export names it in the generation configuration.

        Raises:
            ModelError: the model has none.
        """
        config = getattr(unwrap(self.model), "generation_config", None)
        if config is None:
            raise ModelError(
                f"Model {type(unwrap(self.model)).__name__}: it has no generation_config, where an export states what ends a response; sample with "
                "`SamplingParams(stop_ids=...)`."
            )
        config.eos_token_id = sorted({*self.stop_ids, index(token)})

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the layers below the head by `torch.compile`, in place and with its arguments; head and loss have their own passes over memory.

        Shapes differ from batch to batch: two or three graphs are made, in the first steps.  Single layers may be compiled instead, by their own
        `compile`.  What torch.compile puts around the student, or around its model, computes the same and compiles nothing.
        """
        decoder_of(unwrap(self.model)).compile(*args, **options)

    def forward(self, batch: Batch, loss: OPDLoss) -> LossOutput:
        """Return `loss` of this batch; moves the batch to where the model is.

        Computes in the dtype of the weights, or in `autocast`, whatever autocast the caller is in.  `backward` called in an autocast rounds the
        gradients to it, as in torch; `opd_steps` calls it outside.

        Warns:
            ModelWarning: the first batch with a ref column meets modules that drop values at random.

        Raises:
            ContextOverflowError: a rollout is longer than the model's context.
            InvalidRecordError: an id is of an added token that the head has no row for.
            ModelError: it is sharded as one, so its gradients would be lost; or its head is sharded apart from it.
        """
        # what is traced of it would be records of attrs, which cannot be; `compile` has what is worth it
        output: LossOutput = torch.compiler.disable(self._loss)(batch, loss)
        return output

    def _loss(self, batch: Batch, loss: OPDLoss) -> LossOutput:
        if torch.is_grad_enabled() and hasattr(self, "unshard"):  # `fully_shard` was called on it
            prepare_sharded(self)
        head = evolve(lm_head(self.model, self._known), compute_dtype=self._autocast)
        if hasattr(head.weight, "full_tensor"):  # the student's own group is gathered by now
            raise ModelError(
                f"Model {type(unwrap(self.model)).__name__}: its head is sharded in another group than the student's, and lopd reads the weight of "
                "the head without calling it; leave `fully_shard` of the head out, and call it on the layers and on the student."
            )
        check_device(f"Model {type(unwrap(self.model)).__name__}", head.weight.device)  # Trainer moves it to whatever there is
        self._check_ids(batch)
        batch = batch.to(head.weight.device)
        self._check_length(max(batch.lengths, default=0))
        with torch.autocast(batch.inputs.device.type, enabled=False):
            return loss(self._hidden(batch), head, batch)

    def _check_ids(self, batch: Batch) -> None:
        """Refuse ids without a row; only where there are such is anything looked at, since a batch may be on a GPU, which would be waited for."""
        for name in ("inputs", "targets", "top_k_ids", "drawn_ids") if self._known < self.tokenizer.vocab_size else ():
            ids = getattr(batch, name)
            if ids is not None and ids.numel() and (largest := int(ids.max())) >= self._known:
                raise InvalidRecordError(
                    f"Batch: its {name} hold id {largest}, expected ids below {self._known}, since the student has no row for this added token; "
                    "leave out rollouts with it, and score candidates of the policy if the teacher's most likely tokens have it; or resize the "
                    "token embeddings first, if it is to learn it."
                )

    def _check_length(self, longest: int) -> None:
        context = context_length(self.model)
        if longest > context:
            raise ContextOverflowError(
                f"Batch: its longest rollout has {longest} positions, expected at most the student's context of {context}; leave out longer "
                "rollouts, or use a student with a longer context."
            )

    def _hidden(self, batch: Batch) -> Tensor:
        enabled = self._autocast is not None
        # without its cache, which would hold a copy of every weight, and of one before a step, until the outermost autocast ends
        with torch.autocast(batch.inputs.device.type, dtype=self._autocast or torch.bfloat16, enabled=enabled, cache_enabled=False):
            if batch.ref_logprobs is not None and not self._dropout_is_judged:
                self._dropout_is_judged = True
                warn_of_dropout(self.model)
            return self._layers(self.model, batch.inputs, batch.position_ids, batch.lengths)

    def export(self, folder: str | Path, tokenizer: Any, lineage: Lineage) -> None:
        """Write a folder that engines load, with its lineage beside the weights.

        Where several ranks train, each calls this on its own student (not on the wrapper), and rank 0 writes.

        A full model is written as one; adapters in peft's own format (for an engine that wants one model, merge them, give that their generation
        configuration, and export it).  A full model that also reads images comes with the files of its processor, which vLLM
        needs, if they were beside the weights that it was loaded from.

        The folder appears whole or not at all.  An earlier export of the same teachers is replaced, lineage included; other files in it, such as
        notes, are kept, as are its mode and group.  A mount point, as a volume of a container, gets the files one by one, `lopd.json` last, and is
        not replaced once it has some.

        Warns:
            ModelWarning: its adapters are on a model without a name, on which nothing loads them by itself; or some of its weights are not finite, or
                a few in a wider dtype than the rest, in which the export is loaded.

        Raises:
            ArgumentError: an argument is something else, such as the lineage in place of the tokenizer.
            TokenizerMismatchError: the tokenizer is not the one whose ids the student reads.
            StoreExistsError: the folder holds weights, or files of a model, that no export wrote, a student of other teachers (like the SFT student),
                the model that the adapters are for, or the working directory, or is a mount point with an export; nothing in it is touched, and the
                export is in the folder that the message names.
            ModelError: transformers refuses to save the model or the tokenizer, several adapters are active, or they are on a model that was changed
                since it was loaded; or transformers writes weights of a full model otherwise than it has them: what was written is in the folder that
                the message names.
            StoreWriteError: the disk refused.  After each of these the folder is as it was.
        """
        check_kind("Tokenizer to export", tokenizer, _Saved, "pass the tokenizer that `load_model` gave")
        check_kind("Lineage", lineage, Lineage, "pass `steps.lineage`")
        check_vocabulary("Tokenizer to export", fingerprint_tokenizer(tokenizer), "the student's", self.tokenizer)
        folder = local_path("Export", folder)
        # on each rank: one that refuses alone would leave the others waiting
        Ranks.current().each(lambda: _check_adapters(self.model, before=False, found=self._changed_base))
        _judge_finite(self.model)
        state = on_first(without_runners(self.model).state_dict()) if sharded(self) else None
        Ranks.current().first(lambda: export_model(self.model, tokenizer, lineage, folder, state))


def _check_adapters(model: Any, *, before: bool, found: str | None = None) -> str | None:
    model = without_runners(model)
    if unwrap(model) is not model or getattr(model, "_hf_peft_config_loaded", False):
        from lopd.engines.adapters import check_base  # such a model brought transformers and peft along

        return check_base(model, before=before, found=found)
    return None


def _judge_finite(model: nn.Module) -> None:
    """Warn of weights of this rank that are NaN or infinite, by their extremes: to look at each by itself would take a copy in memory."""
    for name, parameter in model.named_parameters():
        part = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        # of narrower types, as quantised weights have, torch knows no extremes
        if is_plain(part) and part.element_size() > 1 and part.numel():
            least, most = map(float, part.detach().aminmax())
            if not (math.isfinite(least) and math.isfinite(most)):
                warn_user(
                    f"Student: its weight {name!r} goes from {least} to {most}, expected finite numbers; it is exported as it is; train again from "
                    "an earlier checkpoint, at a lower learning rate.",
                    ModelWarning,
                )
                return
