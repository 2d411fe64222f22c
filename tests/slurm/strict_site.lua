-- A site that wants an account, GPUs asked for as --gpus-per-node=h100:N, and lets no job requeue itself.
function slurm_job_submit(job, partitions, user)
  local gpus = job.tres_per_node or ""
  if job.account == nil then
    slurm.log_user("no account: give one with --account")
    return slurm.ERROR
  end
  if job.account ~= "lang@gpu" and job.account ~= "lang@cpu" then
    slurm.log_user("account " .. job.account .. " is not valid here")
    return slurm.ERROR
  end
  if job.partition == "long_h100" and not string.find(gpus, "h100:") then
    slurm.log_user("long_h100: GPUs are asked for with --gpus-per-node=h100:N")
    return slurm.ERROR
  end
  job.requeue = 0
  return slurm.SUCCESS
end

function slurm_job_modify(job, record, partitions, user)
  return slurm.SUCCESS
end

return slurm.SUCCESS
