// Shows what "Load Ternary FLUX" reports as read-only text on the node: the loaded file, or why it was refused.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const NODE = "TernaryFluxLoader";
const WIDGET = "status";
const MINIMUM_SIZE = [340, 290]; // of the node, with room for six lines
const POLL_MS = 250; // the page has no event for a refused workflow
const POLLS = 40;

function statusWidget(node) {
  const existing = node.widgets?.find((widget) => widget.name === WIDGET);
  if (existing) return existing;
  const { widget } = app.widgets.STRING(node, WIDGET, ["STRING", { multiline: true }], app);
  widget.serialize = false; // not in saved workflows
  Object.assign(widget.options, { serialize: false, read_only: true }); // nor in prompts
  if (widget.element) {
    widget.element.readOnly = true;
    widget.element.placeholder = "";
  }
  return widget;
}

function show(node, text) {
  if (node?.type === NODE && text) statusWidget(node).value = text;
}

function showOutput(node, output) {
  if (output?.text?.length) show(node, output.text.join("\n"));
}

function nodeById(id) {
  return app.rootGraph?.getNodeById(id) ?? app.graph?.getNodeById(id);
}

function showRefusals(refusals) {
  for (const [id, { errors }] of Object.entries(refusals)) {
    const reasons = errors.map(({ details, extra_info }) => details.replace(`${extra_info?.input_name} - `, ""));
    show(nodeById(id), [...new Set(reasons)].join("\n"));
  }
}

function watchForRefusals() {
  const before = app.lastNodeErrors;
  let polls = 0;
  const timer = setInterval(() => {
    const now = app.lastNodeErrors;
    if (now && now !== before) showRefusals(now);
    if ((now && now !== before) || ++polls === POLLS) clearInterval(timer);
  }, POLL_MS);
}

app.registerExtension({
  name: "TernaryFlux.Status",
  setup() {
    api.addEventListener("promptQueueing", watchForRefusals);
    api.addEventListener("execution_error", ({ detail }) => show(nodeById(detail.node_id), detail.exception_message));
  },
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== NODE) return;
    const { onNodeCreated, onExecuted } = nodeType.prototype;
    nodeType.prototype.onNodeCreated = function () {
      onNodeCreated?.call(this);
      statusWidget(this); // from the start, so that the node does not grow over its neighbours later
      this.setSize(this.size.map((length, i) => Math.max(length, MINIMUM_SIZE[i])));
    };
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.call(this, output);
      showOutput(this, output);
    };
  },
  // Outputs that come back with a workflow, after changing tabs
  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs)) showOutput(nodeById(id), output);
  },
});
