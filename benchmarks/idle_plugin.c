/* A QEMU plugin that asks to see each block being translated and looks at none: what having such a plugin costs by itself.
 *
 * It includes the agent's own declarations; PLUGIN_API is the version to name, which QEMU checks.
 */
#include "../src/vmexit/agent/qemu_plugin.h"

__attribute__((visibility("default"))) int qemu_plugin_version = PLUGIN_API;

static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb *tb) { (void)id, (void)tb; }

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const struct qemu_info *info, int argc, char **argv)
{
    (void)info, (void)argc, (void)argv;
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
    return 0;
}
