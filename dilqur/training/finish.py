"""What happens after the last step: the last checkpoint, then the model and the manifest, or the marker that there is more to do."""

import torch

from dilqur.checkpoint.format import CheckpointReader
from dilqur.checkpoint.steps import complete_checkpoints
from dilqur.checkpoint.writer import best_checkpoint
from dilqur.training.distributed import broadcast
from dilqur.training.summary import write_result

STOPPED_MIRROR_S = 60  # for the copy of the last checkpoint, where the job is about to end


def finish(run):
    """End a run that made all its steps, or was stopped. A collective."""
    run.profile.stop()
    if run.evaluation_missing and not run.stopped:  # the last one was interrupted
        reason = run.interrupt.urgent_reason()
        run.stopped = broadcast(run.accelerator, reason) or "a signal came to another rank"
    run.save()
    run.watchdog.at("waiting for the last checkpoint", patient=True)
    run.writer.wait()
    run.watchdog.stop()
    run.accelerator.wait_for_everyone()  # from here on rank 0's folder is complete for everyone
    if run.main:
        run.metrics.close()
        request_requeue(run) if run.stopped else write_model_and_manifest(run)
        # all that matters here is done; a stopped run pushes it again when it goes on
        if run.mirror and not run.mirror.wait(STOPPED_MIRROR_S if run.stopped else None):
            problem = run.mirror.problem or "not all is copied yet"
            print(f"warning: mirror_to {run.settings.mirror_to}: {problem}", flush=True)
    run.accelerator.wait_for_everyone()
    if run.settings.report_to:
        run.accelerator.end_training()  # which leaves the process group
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def request_requeue(run):
    run.interrupt.request_requeue()
    where = f"{run.stage.name}: stopped after step {run.progress.step} of {run.max_steps}"
    print(f"{where} ({run.stopped}); the same command goes on from there", flush=True)


def write_model_and_manifest(run):
    best = best_checkpoint(run.writer.folder) if run.settings.load_best_model_at_end else None
    write_result(run, CheckpointReader(best or complete_checkpoints(run.writer.folder)[-1]))
