// Shows what "Load Ternary FLUX" reports after loading (file, size, backend) as read-only text on the node.
import { app } from "../../scripts/app.js";

const NODE = "TernaryFluxLoader";
const WIDGET = "status";
const MINIMUM_SIZE = [400, 210];

function statusWidget(node) {
  const existing = node.widgets?.find((widget) => widget.name === WIDGET);
  if (existing) return existing;
  const { widget } = app.widgets.STRING(node, WIDGET, ["STRING", { multiline: true }], app);
  widget.serialize = false; // not in saved workflows
  Object.assign(widget.options, { serialize: false, read_only: true }); // nor in prompts
  if (widget.element) widget.element.readOnly = true;
  node.setSize(node.size.map((length, i) => Math.max(length, MINIMUM_SIZE[i])));
  return widget;
}

function show(node, output) {
  if (output?.text?.length) statusWidget(node).value = output.text.join("\n");
}

app.registerExtension({
  name: "TernaryFlux.Status",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== NODE) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.call(this, output);
      show(this, output);
    };
  },
  // Outputs that come back with a workflow, after changing tabs
  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs)) {
      const node = app.rootGraph?.getNodeById(id);
      if (node?.type === NODE) show(node, output);
    }
  },
});
