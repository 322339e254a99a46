"""PromQL for the shapes that dashboards and rules share, over a window and within a scope."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scope:
    """Which series are meant (`matcher`), over what window, and which labels are always kept."""

    window: str
    matcher: str = ""
    by: tuple[str, ...] = ()

    def pick(self, metric: str, where: str = "") -> str:
        """A selector; `where` narrows it further."""
        matchers = ",".join(filter(None, (self.matcher, where)))
        return f"{metric}{{{matchers}}}" if matchers else metric

    def over(self, aggregate: str, metric: str, *by: str, where: str = "") -> str:
        """A gauge, aggregated."""
        return f"{aggregate}{self._by(by)} ({self.pick(metric, where)})"

    def rate(self, metric: str, *by: str, where: str = "") -> str:
        """A counter's increase per second, summed."""
        return f"sum{self._by(by)} (rate({self.pick(metric, where)}[{self.window}]))"

    def increase(self, metric: str, *by: str, where: str = "") -> str:
        """A counter's increase over the window, summed."""
        return f"sum{self._by(by)} (increase({self.pick(metric, where)}[{self.window}]))"

    def share(self, part: str, whole: str) -> str:
        """The part of one counter in another; 0 while the part was never counted."""
        all = self.rate(whole)
        return f"({self.rate(part)} or 0 * {all}) / {all}"

    def quantile(self, q: float, histogram: str, *by: str) -> str:
        return f"histogram_quantile({q:g}, {self.rate(f'{histogram}_bucket', 'le', *by)})"

    def mean(self, histogram: str, *by: str) -> str:
        return f"{self.rate(f'{histogram}_sum', *by)} / {self.rate(f'{histogram}_count', *by)}"

    def _by(self, labels: tuple[str, ...]) -> str:
        kept = ", ".join((*self.by, *labels))
        return f" by ({kept})" if kept else ""
