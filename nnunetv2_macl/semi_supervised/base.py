"""Choose the images of trainings that also learn from unlabelled images, and refuse what these trainings do not support."""

from __future__ import annotations

import hashlib
from pathlib import Path

from nnunetv2_macl.data import Case
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.messages import log_to
from nnunetv2_macl.nnunet import GROUP_VARIABLE
from nnunetv2_macl.patients import group_regex, of_other_patients
from nnunetv2_macl.planning.plan import current_processes, plan_file, read_plan
from nnunetv2_macl.preprocessing.cases import preprocess_unlabelled
from nnunetv2_macl.preprocessing.sources import UNLABELLED_FOLDER, training_cases
from nnunetv2_macl.text import pluralise
from nnunetv2_macl.training.finetune import nnUNetTrainerMACL
from nnunetv2_macl.training.seeded import SeededTraining


def no_cascade(configuration: str) -> str:
    """Return the message that the second stage of a cascade cannot learn from unlabelled images."""
    return (
        f"{configuration} also needs the first stage's segmentation of each image, which nnU-Net writes for validation cases "
        "only. Train both stages without unlabelled images: -tr nnUNetTrainerMACL"
    )


class UnlabelledTraining(SeededTraining, nnUNetTrainerMACL):
    """Trains as nnU-Net does, on the labelled cases of a fold and on unlabelled images.

    The training starts from pre-trained weights, as ``nnUNetTrainerMACL`` does. Its checkpoints are ordinary nnU-Net
    checkpoints.
    """

    def on_train_start(self) -> None:
        # before the search for weights, whose message would advise a pre-training in vain
        self.check()
        super().on_train_start()

    def check(self) -> None:
        """Raise UserError if this training is not possible."""
        if self.is_cascaded:
            raise UserError(no_cascade(self.configuration_name))
        if self.is_ddp:
            raise UserError(
                f"{type(self).__name__} trains on one GPU. Leave out -num_gpus, or train without unlabelled images: "
                "-tr nnUNetTrainerMACL"
            )

    def unlabelled_cases(self) -> list[Case]:
        """Return the preprocessed cases to learn from without labels, and log how many cases are left out.

        These are the unlabelled images of pre-training, and the labelled cases that are in neither part of the fold, without
        their labels.

        Raises:
            UserError: There is no such case, or the regular expression of the patients does not match a name.
        """
        configuration = self._configuration
        file = plan_file(configuration)
        plan = read_plan(file) if file.is_file() else None
        with log_to(self.print_to_log_file):
            # nnU-Net's command has no option to leave images out, and the log names those that are left out.
            unlabelled = preprocess_unlabelled(
                configuration,
                plan.unlabelled_datasets if plan else [],
                processes=current_processes(),
                skip_unreadable=True,
                channel_map=plan.channel_map if plan else None,
            ).cases
        training, validation = map(set, self.do_split())
        others = [case for case in training_cases(configuration) if case.name not in training | validation]
        cases = [*unlabelled, *others]
        held_out = validation - training
        # Without a regular expression, the images of validation cases are left out already, because they are labelled cases.
        kept = of_other_patients(cases, held_out)
        if not kept:
            left_out = (
                f" {pluralise(len(cases), 'image')} of the fold's validation patients are left out." if cases else ""
            )
            raise UserError(
                f"There is no unlabelled image to learn from. Put images into {UNLABELLED_FOLDER} of "
                f"{configuration.dataset_name}.{left_out}"
            )
        self.print_to_log_file(
            f"Unlabelled images used: {len(kept)} ({len(set(kept) & set(others))} of them labelled cases outside of this fold). "
            f"Left out: {pluralise(len(held_out), 'validation case')}, {len(cases) - len(kept)} other images of their patients"
        )
        if group_regex() is None and held_out:
            self.print_to_log_file(
                "Each case counts as a separate patient. If a patient has several images, set the part of a case's name that "
                f"is the patient, for example: export {GROUP_VARIABLE}='^[^_]+'",
                add_timestamp=False,
            )
        self._remember(kept)
        return kept

    def _remember(self, cases: list[Case]) -> None:
        """Keep which cases the training uses for its checkpoint, and warn if a continued training began with other cases."""
        names = sorted(f"{Path(case.file).parent.name}/{case.name}" for case in cases)
        used = {"number": len(names), "sha256": hashlib.sha256("\n".join(names).encode()).hexdigest()}
        former = self.macl_origin.get("unlabelled_images", used) if self._continues else used
        if former != used:
            self.print_to_log_file(
                f"WARNING: this training began with {former['number']} unlabelled images, and continues with {used['number']}, "
                "not all of them the same. So its result is not that of a training without a stop."
            )
        self.macl_origin["unlabelled_images"] = used
