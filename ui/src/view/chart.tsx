// A line over the last minutes, drawn as SVG.
interface Props {
  label: string;
  /** Values, oldest first; `undefined` where nothing was measured. */
  values: (number | undefined)[];
  /** Values that the width holds. */
  capacity: number;
  /** Top of the scale; by default the largest value. */
  max?: number;
  show: (value: number) => string;
}

const WIDTH = 240;
const HEIGHT = 56;

export function Chart({ label, values, capacity, max, show }: Props) {
  const known = values.filter((value) => value !== undefined);
  const top = max ?? Math.max(...known, 1e-9);
  const offset = capacity - values.length;
  const points = values.flatMap((value, index) => {
    if (value === undefined) return [];
    const x = ((offset + index) / (capacity - 1)) * WIDTH;
    const y = HEIGHT - 2 - (Math.min(value, top) / top) * (HEIGHT - 4);
    return [`${x.toFixed(1)},${y.toFixed(1)}`];
  });
  const last = known.at(-1);
  const summary = last === undefined ? "no values yet" : `now ${show(last)}, most ${show(Math.max(...known))}`;
  const first = points[0]?.split(",")[0] ?? "0";
  return (
    <svg
      class="chart"
      viewBox={`0 0 ${WIDTH} ${HEIGHT}`}
      preserveAspectRatio="none"
      role="img"
      aria-label={`${label}: ${summary}`}
    >
      {points.length > 1 && (
        <polygon class="area" points={`${first},${HEIGHT} ${points.join(" ")} ${WIDTH},${HEIGHT}`} />
      )}
      <polyline class="line" points={points.join(" ")} />
    </svg>
  );
}
