"""Every defense by its name; all share the signature `defense.Defense`."""

from models.defenses import apt, apt_ensemble, ensemble, gate, plain, rtpt, tapt, thrift, tpt, ttc
from models.defenses.defense import Method

DEFENSES: dict[str, Method] = {
    "plain": Method(plain.defend, "none", adapts=False),
    "ensemble": Method(ensemble.defend, "none", adapts=False),
    "apt": Method(apt.defend, "learned", adapts=False),
    "apt-ensemble": Method(apt_ensemble.defend, "learned", adapts=False),
    "tapt": Method(tapt.defend, "learned", adapts=True),
    "tpt": Method(tpt.defend, "words", adapts=True),
    "rtpt": Method(rtpt.defend, "words", adapts=True),
    "ttc": Method(ttc.defend, "none", adapts=True),
    "gate": Method(gate.defend, "learned", adapts=True),
    "thrift": Method(thrift.defend, "learned", adapts=True),
}
