// What a person reads on a panel: the replies of Prometheus, reduced and formatted by Grafana's own @grafana/data.
//
// Standard input is {panel, replies}: a panel of the dashboard, and for each of its queries {refId, legend, data}, the
// `data` of Prometheus' reply. Standard output is a list of [title, text]. With {titleFormat, replies} instead it is the
// titles of an annotation's events.
//
// Two parts of Grafana are not in that library. The Prometheus datasource makes frames of replies: one for each series,
// with its legend, and one without fields for a reply without series. The transformation "Config from query results"
// takes the reduced value of one query as a setting of the others.

"use strict";

globalThis.console = new console.Console(process.stderr); // a dependency prints an advertisement
require("react-use"); // before there is a `window`, which it takes for that of a browser with a document
globalThis.window = globalThis;
globalThis.navigator ??= { language: "en-US", languages: ["en-US"] };
globalThis.addEventListener = () => {}; // the library's store of preferences listens to other tabs

const grafana = require("@grafana/data");

const { FieldType, ThresholdsMode } = grafana;
const theme = grafana.createTheme();
const asIs = (value) => value;

/** The standard options of a field that the panels use. */
const registry = new grafana.Registry(() =>
  [
    ["unit", grafana.unitOverrideProcessor],
    ["decimals", grafana.numberOverrideProcessor],
    ["min", grafana.numberOverrideProcessor],
    ["max", grafana.numberOverrideProcessor],
    ["noValue", grafana.stringOverrideProcessor],
    ["displayName", grafana.displayNameOverrideProcessor],
    ["mappings", grafana.valueMappingsOverrideProcessor],
    ["thresholds", grafana.thresholdsOverrideProcessor],
    ["color", asIs],
  ].map(([id, process]) => ({ id, name: id, path: id, process, shouldApply: () => true })),
);

function framesOf({ refId, legend, data }) {
  if (data.result.length === 0) {
    return [{ refId, fields: [], length: 0 }];
  }
  return data.result.map(({ metric, value, values }) => {
    const samples = values ?? [value];
    const displayNameFromDS = grafana.renderLegendFormat(legend, metric);
    return grafana.toDataFrame({
      refId,
      fields: [
        { name: "Time", type: FieldType.time, values: samples.map(([time]) => time * 1000) },
        {
          name: "Value",
          type: FieldType.number,
          values: samples.map(([, text]) => numberOf(text)),
          labels: metric,
          config: { displayNameFromDS },
        },
      ],
    });
  });
}

function numberOf(text) {
  return text === "+Inf" ? Infinity : text === "-Inf" ? -Infinity : Number(text);
}

function configFromData(frames, { configRefId, applyTo, mappings }) {
  const source = frames.find((frame) => frame.refId === configRefId);
  const found = {};
  for (const field of source.fields) {
    const name = grafana.getFieldDisplayName(field, source, frames);
    for (const { fieldName, handlerKey } of mappings) {
      if (fieldName === name) {
        found[handlerKey] = grafana.reduceField({ field, reducers: ["lastNotNull"] }).lastNotNull;
      }
    }
  }
  const matches = grafana.getFieldMatcher(applyTo);
  return frames
    .filter((frame) => frame !== source)
    .map((frame) => ({
      ...frame,
      fields: frame.fields.map((field) =>
        matches(field, frame, frames) ? { ...field, config: { ...field.config, ...found } } : field,
      ),
    }));
}

function read(panel, replies) {
  let data = replies.flatMap(framesOf);
  for (const { id, options } of panel.transformations ?? []) {
    if (id !== "configFromData") {
      throw new Error(`a transformation that is not known here: ${id}`);
    }
    data = configFromData(data, options);
  }
  const fieldConfig = structuredClone(panel.fieldConfig);
  const { thresholds } = fieldConfig.defaults;
  if (thresholds) {
    // JSON has no -Infinity; Grafana puts it in when it loads a dashboard.
    thresholds.mode ??= ThresholdsMode.Absolute;
    thresholds.steps[0].value ??= -Infinity;
  }
  const shared = { fieldConfig, replaceVariables: asIs, theme, timeZone: "utc" };
  const values = grafana.getFieldDisplayValues({
    ...shared,
    reduceOptions: panel.options.reduceOptions,
    data: grafana.applyFieldOverrides({ ...shared, data, fieldConfigRegistry: registry }),
  });
  return values.map(({ name, display }) => [display.title ?? name, grafana.formattedValueToString(display)]);
}

function titles(titleFormat, replies) {
  return replies.flatMap(({ data }) => data.result.map(({ metric }) => grafana.renderLegendFormat(titleFormat, metric)));
}

const { panel, titleFormat, replies } = JSON.parse(require("node:fs").readFileSync(0, "utf-8"));
process.stdout.write(JSON.stringify(panel ? read(panel, replies) : titles(titleFormat, replies)));
