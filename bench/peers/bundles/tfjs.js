// What is bundled for tfjs: its main file under Deno has no gradients, and the backend must share the one core that has them.
import "@tensorflow/tfjs-core/dist/register_all_gradients.js";
import "@tensorflow/tfjs-backend-webgpu";
export * from "@tensorflow/tfjs-core/dist/index.js";
