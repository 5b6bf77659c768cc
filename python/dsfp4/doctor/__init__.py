"""The machine: what it is, how fast it is, and what to fix on it."""

from dsfp4.doctor.facts import Machine, System, examine
from dsfp4.doctor.findings import Finding, findings
from dsfp4.doctor.rates import Rates, measure

__all__ = ["Finding", "Machine", "Rates", "System", "examine", "findings", "measure"]
