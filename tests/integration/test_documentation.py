"""Every command in README and docs runs on a generated data set, on a CPU and with few steps."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import Workspace
from dicom_files import volume, write_series
from test_converting import imagechd, mmwhs
from test_docs import PAGES, blocks, name_of

from nnunetv2_macl.synthetic import generate_dataset

pytestmark = pytest.mark.slow

# blocks with this text are left out, because they install the package or run these tests
NOT_HERE = "git clone"
# replaces the commands by shorter ones
PRELUDE = """
set -euo pipefail
nnUNetv2_plan_and_preprocess() { command nnUNetv2_plan_and_preprocess "$@" -npfp 1 -np 1; }
nnUNetv2_macl_doctor() { command nnUNetv2_macl_doctor "$@" -device cpu; }
SHORT="-device cpu -np 2 -num_epochs 1 -num_iterations_per_epoch 2 -batch_size 4"
nnUNetv2_train_macl_pretrain() {
  [[ " $* " == *" -num_gpus "* ]] && set -- "${@:1:3}"  # this machine may have no GPU
  command nnUNetv2_train_macl_pretrain "$@" $SHORT
}
torchrun() {
  while [[ "$1" != nnUNetv2_train_macl_pretrain ]]; do shift; done
  command torchrun --standalone --nproc_per_node 2 --no-python "$@" $SHORT
}
# nnU-Net starts this many processes for each validation and prediction, and each imports torch
export nnUNet_def_n_proc=1
export SLURM_JOB_NODELIST=here SLURM_NNODES=1 SLURM_JOB_ID=1
scontrol() { echo localhost; }
srun() { "$@"; }
# replaces each fine-tuning trainer by its short variant; the default is nnU-Net's own trainer
quick() {
  arguments=()
  local argument
  for argument in "$@"; do
    [[ "$argument" =~ ^(nnUNetTrainer(MACL|MACLPaper|MACLSemi|MACLSelfTraining(_scratch)?)?)(_([0-9]+epochs?|short))?$ ]] &&
      argument="${BASH_REMATCH[1]}_quick"
    arguments+=("$argument")
  done
  [[ " $* " == *" -tr "* ]] || arguments+=(-tr nnUNetTrainer_quick)
}
# the folder of a model has the name of its trainer
mv() { command mv "${@//nnUNetTrainerMACL_short/nnUNetTrainerMACL_quick}"; }
nnUNetv2_train() {
  quick "$@"
  nnUNet_extTrainer="$nnUNet_extTrainer:$QUICK" command nnUNetv2_train "${arguments[@]}" -device cpu
}
# the command with its default options: DATASET -c CONFIGURATION -f FOLD
nnUNetv2_macl_self_train() { nnUNetv2_train "$1" "$3" "$5" -tr nnUNetTrainerMACLSelfTraining; }
nnUNetv2_find_best_configuration() {
  quick "$@"
  nnUNet_extTrainer="$nnUNet_extTrainer:$QUICK" command nnUNetv2_find_best_configuration "${arguments[@]}" -np 1
}
nnUNetv2_macl_compare() {
  command nnUNetv2_macl_compare "$@" --group_regex '.*' --labels 2 --seeds 1 --test 1 --validation 1 \
    --finetuning sgd --rates 1e-2 --epochs 1 --iterations 1 -batch_size 2 \
    --pretrain_epochs 1 --pretrain_iterations 1 --pretrain_batch_size 4 \
    --disable_tta -device cpu -np 1
}
nnUNetv2_macl_collect() { command nnUNetv2_macl_collect "$@" --private_folder private -np 1; }
nnUNetv2_predict() { quick "$@" && command nnUNetv2_predict "${arguments[@]}" -device cpu; }
"""
QUICK = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_macl.semi_supervised.self_training import nnUNetTrainerMACLSelfTraining
from nnunetv2_macl.semi_supervised.trainer import nnUNetTrainerMACLSemi
from nnunetv2_macl.training.finetune import nnUNetTrainerMACL
from nnunetv2_macl.training.finetune_paper import nnUNetTrainerMACLPaper


class nnUNetTrainerMACLPaper_quick(nnUNetTrainerMACLPaper):
    finetuning_epochs = 1


class nnUNetTrainerMACL_quick(nnUNetTrainerMACL):
    finetuning_epochs = finetuning_iterations = 1


class nnUNetTrainerMACLSemi_quick(nnUNetTrainerMACLSemi):
    finetuning_epochs = finetuning_iterations = 1


class nnUNetTrainerMACLSelfTraining_quick(nnUNetTrainerMACLSelfTraining):
    default_teacher = "nnUNetTrainerMACL_quick"
    finetuning_epochs = finetuning_iterations = 1


class nnUNetTrainerMACLSelfTraining_scratch_quick(nnUNetTrainerMACLSelfTraining_quick):
    default_teacher = "nnUNetTrainer_quick"
    from_scratch = True


class nnUNetTrainer_quick(nnUNetTrainer):
    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 1
        self.num_iterations_per_epoch = 1
        self.num_val_iterations_per_epoch = 1
"""


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """Return a workspace with everything that a page may expect: Dataset027_ACDC, planned and pre-trained."""
    space = Workspace(tmp_path_factory.mktemp("docs") / "nnunet")
    raw = space.raw / "Dataset027_ACDC"
    generate_dataset(raw, labelled=5, unlabelled=3, test=1, shape=(8, 40, 48))
    generate_dataset(space.raw / "Dataset028_Archive", labelled=3, unlabelled=2, test=0, shape=(8, 40, 48), seed=1)
    for number in range(2):
        write_series(space.folder / "export" / str(number), volume(number, (8, 40, 48)), f"1.{number}", f"ID {number}")
    imagechd(space.folder / "ImageCHD_dataset")
    mmwhs(space.folder / "MM-WHS_2017")
    (space.folder / "quick").mkdir()
    (space.folder / "quick" / "nnUNetTrainerMACL_quick.py").write_text(QUICK)
    shutil.copytree(raw / "imagesTs", space.folder / "images")
    bash(
        space,
        "nnUNetv2_plan_and_preprocess -d 27 -c 2d 3d_fullres\n"
        "nnUNetv2_train_macl_pretrain 27 -c 2d\nnnUNetv2_train_macl_pretrain 27 -c 3d_fullres",
    )
    runs = space.results / "Dataset027_ACDC"
    encoder = runs / "nnUNetTrainerMACLPretrain__nnUNetPlans__3d_fullres" / "fold_all" / "macl_encoder.pth"
    shutil.copy(encoder, space.folder)
    # weights of another data set
    shutil.copytree(
        *(d / "nnUNetTrainerMACLPretrain__nnUNetPlans__2d" for d in (runs, runs.with_name("Dataset028_Archive")))
    )
    return space


def bash(space, script):
    environment = space.environment | {"QUICK": str(space.folder / "quick")}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    process = subprocess.run(
        ["bash", "-c", PRELUDE + script],
        cwd=space.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
        timeout=1500,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-5000:]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")], ids=name_of)
def test_the_commands_of_a_page_run(page, space):
    """The commands run in their order in one shell, as a reader types them."""
    script = "\n".join(block for block in blocks(page, "bash") if NOT_HERE not in block)
    assert script
    # the generated cases have other names
    bash(space, script.replace("^patient[0-9]+", "^case_[0-9]+"))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_the_programs_of_a_page_run(page, space):
    for number, block in enumerate(blocks(page, "python")):
        file = space.folder / f"{page.parent.name}_{page.stem}_{number}.py"
        file.write_text(block)
        bash(space, f"{sys.executable} {file}")
