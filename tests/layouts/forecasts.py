"""The same plan on paper and under a cap."""

from lowvram_lab.engine.load import load
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.measure import run_workload
from lowvram_lab.planner.profile import Workload


def check_forecast(folder) -> None:
    """A directory as it is stored takes, to the byte, what is forecast."""
    plan, workload = Plan.uniform(find_source(folder).spec(), "stored", context=64), Workload(40, 4)
    dry = forecast(plan, open_gpu("1000MiB"), workload=workload)
    real = run_workload(load(plan, open_gpu("1000MiB"), progress=False), workload)
    assert (dry.compare(real)["difference"] == 0).all(), dry.compare(real)
    assert real.weights_bytes == plan.weight_bytes()
